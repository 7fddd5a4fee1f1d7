"""`harmonica-rt schedule fit`: fits the weights of a schedule to a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from harmonica_rt.cli.console import console, print_unwrapped
from harmonica_rt.cli.options import (
    ARGUMENTS,
    DEVICE,
    DTYPE,
    GUIDANCE,
    MODEL,
    RECIPE,
    SAMPLER,
    SAMPLER_ARGUMENTS,
    SCHEDULE,
    SCHEDULE_OUT,
    SEED,
    TRANSFORMER,
)
from harmonica_rt.cli.schedule import read
from harmonica_rt.errors import HarmonicaError

RUNS: Any = typer.Option(1, min=1, help="Calls of the pipeline to fit to; call k has seed + k.")


def fit(
    model: Path = MODEL,
    schedule: Path = SCHEDULE,
    out: Path = SCHEDULE_OUT,
    order: int = typer.Option(2, min=1, max=4, help="The most weights per reused entry."),
    per_site: bool = typer.Option(False, "--per-site", help="Weights for each site, not shared by those of a step."),
    runs: int = RUNS,
    recipe: list[str] = RECIPE,
    arg: list[str] = ARGUMENTS,
    guidance: float | None = GUIDANCE,
    transformer: str | None = TRANSFORMER,
    sampler: str | None = SAMPLER,
    sampler_arg: list[str] = SAMPLER_ARGUMENTS,
    seed: int = SEED,
    dtype: str = DTYPE,
    device: str = DEVICE,
) -> None:
    """Fit the weights that reused values are added up with, by least squares, in about the time of two runs."""
    import harmonica_rt as hrt
    from harmonica_rt.cli.calling import call_arguments, calling
    from harmonica_rt.cli.loading import PipelineChoice, load_pipeline
    from harmonica_rt.schedule import Schedule

    given = read(schedule)
    if not isinstance(given, Schedule):
        raise HarmonicaError(f"{schedule} is a set of schedules; `fit` takes one of them, as a file of its own")
    pipeline = load_pipeline(PipelineChoice(model, transformer, sampler, tuple(sampler_arg), dtype, device))
    call = call_arguments(pipeline, arg, given.steps, guidance)
    with console.status("fitting"), calling(pipeline, call):
        made = hrt.fit(pipeline, given, [call] * runs, order=order, per_site=per_site, seed=seed)
    made.save(out)
    if made.weights_by is not None:
        error = made.weights_by.hyper_parameters["relative_error"]
        print_unwrapped(f"error of the reused values: {error} of that of plain reuse")
    print_unwrapped(f"{made}\nwritten to {out}")
