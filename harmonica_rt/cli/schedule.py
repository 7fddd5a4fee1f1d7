"""`harmonica-rt schedule ...`: shows, draws, converts and makes schedule files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from harmonica_rt.cli.command import Command
from harmonica_rt.cli.console import console, print_unwrapped
from harmonica_rt.cli.options import (
    LEVEL,
    MODEL,
    PATTERN,
    SCHEDULE,
    SCHEDULE_OUT,
    SEED,
    STEPS,
    one_of,
    writable_picture,
)
from harmonica_rt.errors import HarmonicaError, ScheduleError

if TYPE_CHECKING:
    from harmonica_rt.schedule import Schedule, ScheduleSet

app = typer.Typer(no_args_is_help=True)

_ROUTERS = (".pt", ".pth", ".ckpt", ".bin")


def read(path: Path) -> Schedule | ScheduleSet:
    """The schedule in a file, or in a directory that `save_pretrained` wrote; or a set: its file, or a directory.

    Raises:
        HarmonicaError: there is no schedule, or a file cannot be read or is malformed.
    """
    from harmonica_rt.schedule import Schedule, ScheduleSet
    from harmonica_rt.schedule.hub import FILE
    from harmonica_rt.schedule.schedule_set import is_set

    if path.is_dir():
        if not (path / FILE).is_file():
            if any(path.glob("*.json")):
                return ScheduleSet.load(path)
            raise HarmonicaError(f"{path} is a directory without a {FILE}, and without other schedule files (*.json)")
        path = path / FILE
    try:
        return ScheduleSet.load(path) if is_set(path) else Schedule.load(path)
    except ScheduleError as error:
        if path.suffix not in _ROUTERS or not path.is_file():
            raise
        hint = "`harmonica-rt schedule convert` makes schedules from router checkpoints"
        raise ScheduleError(f"{error}; {hint}") from error


def read_one(path: Path, steps: int | None, *, resample: bool = False) -> Schedule:
    """The schedule of a file; of a set, the one for this number of steps.

    Args:
        path: see `read`.
        steps: the number of steps; None: that of the only schedule.
        resample: make a schedule for another number of steps, instead of an error.

    Raises:
        HarmonicaError: see `read`; or there is no schedule for these steps, or there are several and no number.
    """
    from harmonica_rt.schedule import ScheduleSet

    found = ScheduleSet.of(read(path))
    listed = " and ".join(map(str, found.steps))
    if steps is None and len(found.steps) > 1:
        raise HarmonicaError(f"{path} has schedules for {listed} steps, and one is needed: give --steps")
    if steps not in (None, *found.steps) and not resample:
        raise HarmonicaError(f"--steps is {steps}, but {path} is for {listed} steps; leave --steps out")
    return found.resample(steps or found.steps[0])


@app.command(cls=Command)
def show(schedule: Path = SCHEDULE, steps: int | None = STEPS) -> None:
    """Draw a schedule in the terminal: steps down, sites across, with the CUR and the weights of each step.

    All schedules of a set are drawn, one below the other.
    """
    from harmonica_rt.schedule import ScheduleSet, render

    found = ScheduleSet.of(read(schedule))
    for each in found.schedules if steps is None else (found.resample(steps),):
        console.print(render(each, width=console.width))


@app.command(cls=Command)
def plot(
    schedule: Path = SCHEDULE,
    steps: int | None = STEPS,
    out: Path = typer.Argument(
        ...,
        metavar="PNG",
        dir_okay=False,
        writable=True,
        callback=writable_picture,
        help="Where the picture is written (.png, .svg, .pdf).",
    ),
) -> None:
    """Draw a schedule as a heat map."""
    read_one(schedule, steps, resample=True).plot(out)
    print_unwrapped(f"written to {out}")


@app.command(cls=Command)
def convert(
    router: Path = typer.Argument(..., metavar="CHECKPOINT", help="A HarmoniCa or Learning-to-Cache router."),
    out: Path = SCHEDULE_OUT,
    threshold: float | None = typer.Option(None, min=0, max=1, help="Compute where sigmoid(logit) is above this."),
    kind: str = typer.Option("auto", help="harmonica, l2c-dit, l2c-uvit, or auto."),
    steps: int | None = typer.Option(None, min=1, help="Expected number of steps."),
) -> None:
    """Make a schedule from a router checkpoint of the released HarmoniCa or Learning-to-Cache code."""
    from typing import get_args

    from harmonica_rt.schedule import RouterKind, Schedule

    one_of("--kind", kind, get_args(RouterKind))
    made = Schedule.from_router(router, threshold=threshold, kind=kind, steps=steps)  # type: ignore[arg-type]
    made.save(out)
    print_unwrapped(f"{made}\nwritten to {out}")


@app.command(cls=Command)
def make(
    model: Path = MODEL,
    out: Path = SCHEDULE_OUT,
    steps: int | None = typer.Option(None, min=1, help="Model evaluations of a run (default: 20, or as --mask says)."),
    every: int | None = typer.Option(None, min=1, help="Compute every k-th step."),
    random: float | None = typer.Option(None, min=0, max=1, help="Reuse this share of entries at random."),
    mask: str | None = typer.Option(None, help="One 0 or 1 per step, 1 = compute."),
    pattern: list[str] = PATTERN,
    level: str | None = LEVEL,
    seed: int = SEED,
) -> None:
    """Make a schedule for the sites of a pipeline by hand: one of --every, --random, --mask."""
    from harmonica_rt.schedule import Schedule

    if sum(option is not None for option in (every, random, mask)) != 1:
        raise HarmonicaError("give exactly one of --every K, --random CUR and --mask 1010...")
    if mask is not None and steps not in (None, len(mask)):
        raise HarmonicaError(f"--mask has {len(mask)} entries, one per step, but --steps is {steps}; drop one of them")

    from harmonica_rt import find_sites, model_info
    from harmonica_rt.cli.loading import load_denoiser

    denoiser = load_denoiser(model)
    sites = find_sites(denoiser, pattern or None, level=level)
    if every is not None:
        made = Schedule.every(every, steps=steps or 20, sites=sites)
    elif random is not None:
        made = Schedule.random(random, steps=steps or 20, sites=sites, seed=seed)
    else:
        made = Schedule.from_mask(mask or "", sites=sites)
    made = made.with_provenance(model=model_info(denoiser))
    made.save(out)
    print_unwrapped(f"{made}\nwritten to {out}")
