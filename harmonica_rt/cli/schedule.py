"""`harmonica-rt schedule ...`: files in, pictures and files out."""

from __future__ import annotations

from pathlib import Path

import typer

from harmonica_rt.cli.console import console
from harmonica_rt.cli.options import MODEL, SCHEDULE, SCHEDULE_OUT, SEED, writable_picture
from harmonica_rt.errors import HarmonicaError

app = typer.Typer(no_args_is_help=True)


@app.command()
def show(schedule: Path = SCHEDULE) -> None:
    """Draw a schedule in the terminal: steps down, sites across."""
    from harmonica_rt.schedule import Schedule, render

    console.print(render(Schedule.load(schedule), width=console.width))


@app.command()
def plot(
    schedule: Path = SCHEDULE,
    out: Path = typer.Argument(
        ...,
        metavar="PNG",
        dir_okay=False,
        writable=True,
        callback=writable_picture,
        help="Where the picture goes (.png, .svg, .pdf).",
    ),
) -> None:
    """Draw a schedule as a heat map."""
    from harmonica_rt.schedule import Schedule

    Schedule.load(schedule).plot(out)
    console.print(f"written to {out}")


@app.command()
def convert(
    router: Path = typer.Argument(..., metavar="CHECKPOINT", help="A HarmoniCa or Learning-to-Cache router."),
    out: Path = SCHEDULE_OUT,
    threshold: float | None = typer.Option(None, min=0, max=1, help="Compute where sigmoid(logit) is above this."),
    kind: str = typer.Option("auto", help="harmonica, l2c-dit, l2c-uvit, or auto."),
    steps: int | None = typer.Option(None, min=1, help="Expected number of steps."),
) -> None:
    """Make a schedule of a router checkpoint of the released HarmoniCa or Learning-to-Cache code."""
    from typing import get_args

    from harmonica_rt.schedule import RouterKind, Schedule

    kinds = get_args(RouterKind)
    if kind not in kinds:
        raise HarmonicaError(f"--kind {kind} is not known; choose one of {', '.join(kinds)}")
    made = Schedule.from_router(router, threshold=threshold, kind=kind, steps=steps)  # type: ignore[arg-type]
    made.save(out)
    console.print(f"{made}\nwritten to {out}")


@app.command()
def make(
    model: Path = MODEL,
    out: Path = SCHEDULE_OUT,
    steps: int = typer.Option(20, min=1, help="Model evaluations of a run, where no --mask says."),
    every: int | None = typer.Option(None, min=1, help="Compute every k-th step."),
    random: float | None = typer.Option(None, min=0, max=1, help="Reuse this share of entries at random."),
    mask: str | None = typer.Option(None, help="One 0 or 1 for each step, 1 = compute."),
    seed: int = SEED,
) -> None:
    """Make a schedule for the sites of a pipeline by hand: one of --every, --random, --mask."""
    from harmonica_rt import Schedule, find_sites, model_info
    from harmonica_rt.cli.loading import load_denoiser

    if sum(option is not None for option in (every, random, mask)) != 1:
        raise HarmonicaError("say one of --every K, --random CUR, --mask 1010...")
    denoiser = load_denoiser(model)
    sites = find_sites(denoiser)
    if every is not None:
        made = Schedule.every(every, steps=steps, sites=sites)
    elif random is not None:
        made = Schedule.random(random, steps=steps, sites=sites, seed=seed)
    else:
        made = Schedule.from_mask(mask or "", sites=sites)
    made = made.with_provenance(model=model_info(denoiser))
    made.save(out)
    console.print(f"{made}\nwritten to {out}")
