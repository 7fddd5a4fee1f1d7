"""`harmonica-rt verify` and `harmonica-rt bench`: compare a compiled pipeline with the reference and the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from harmonica_rt.cli.console import console
from harmonica_rt.cli.options import (
    ARGUMENTS,
    DEVICE,
    DTYPE,
    GRAPHS,
    GUIDANCE,
    LOWERING,
    MODEL,
    OTHER_STEPS,
    RECIPE,
    REPEATS,
    SAMPLER,
    SAMPLER_ARGUMENTS,
    SCHEDULE,
    SEED,
    TRANSFORMER,
    one_of,
)
from harmonica_rt.cli.schedule import read
from harmonica_rt.cli.tables import latency_table, parity_table

if TYPE_CHECKING:
    from harmonica_rt.cli.loading import PipelineChoice
    from harmonica_rt.parity.report import ParityReport
    from harmonica_rt.schedule import Schedule, ScheduleSet


@dataclass(frozen=True)
class _Case:
    """A pipeline, the schedule that it is compiled with, and the arguments of its calls."""

    pipeline: Any
    schedule: Schedule | ScheduleSet
    arguments: dict[str, Any]

    @classmethod
    def load(
        cls, choice: PipelineChoice, schedule: Schedule | ScheduleSet, given: Sequence[str], guidance: float | None
    ) -> _Case:
        """Load the pipeline; `given` are the `name=value` pairs of `--arg`."""
        from harmonica_rt.cli.calling import call_arguments
        from harmonica_rt.cli.loading import load_pipeline
        from harmonica_rt.schedule import ScheduleSet

        pipeline, steps = load_pipeline(choice), ScheduleSet.of(schedule).steps
        return cls(pipeline, schedule, call_arguments(pipeline, given, steps[0], guidance))

    def checked_parity(self, **options: Any) -> ParityReport:
        """Compare compiled with reference and return the report; if they differ, end the command with exit status 1."""
        import harmonica_rt as hrt
        from harmonica_rt.cli.calling import calling

        try:
            with console.status("reference and compiled, side by side"), calling(self.pipeline, self.arguments):
                return hrt.verify(self.pipeline, self.schedule, **options, **self.arguments)
        except hrt.ParityError as error:
            console.print(str(error), style="bold red")
            raise typer.Exit(1) from None


def verify(
    model: Path = MODEL,
    schedule: Path = SCHEDULE,
    recipe: list[str] = RECIPE,
    arg: list[str] = ARGUMENTS,
    guidance: float | None = GUIDANCE,
    lowering: str = LOWERING,
    graphs: str = GRAPHS,
    on_other_steps: str = OTHER_STEPS,
    seed: int = SEED,
    tolerance: str = typer.Option("auto", help="exact, measured, or auto (exact for plain on CPU, else measured)."),
    transformer: str | None = TRANSFORMER,
    sampler: str | None = SAMPLER,
    sampler_arg: list[str] = SAMPLER_ARGUMENTS,
    dtype: str = DTYPE,
    device: str = DEVICE,
) -> None:
    """Compare the compiled pipeline with the reference, step by step; exit status 1 if they differ."""
    from typing import get_args

    from harmonica_rt.cli.loading import PipelineChoice
    from harmonica_rt.parity.lockstep import Tolerance

    one_of("--tolerance", tolerance, get_args(Tolerance))
    choice = PipelineChoice(model, transformer, sampler, tuple(sampler_arg), dtype, device)
    case = _Case.load(choice, read(schedule), arg, guidance)
    report = case.checked_parity(
        lowering=lowering, graphs=graphs, on_other_steps=on_other_steps, seed=seed, tolerance=tolerance
    )
    console.print(parity_table(report))
    console.print(str(report), style="bold green")


def bench(
    model: Path = MODEL,
    schedule: Path = SCHEDULE,
    recipe: list[str] = RECIPE,
    arg: list[str] = ARGUMENTS,
    guidance: float | None = GUIDANCE,
    lowering: str = LOWERING,
    graphs: str = GRAPHS,
    on_other_steps: str = OTHER_STEPS,
    repeats: int = REPEATS,
    seed: int = SEED,
    transformer: str | None = TRANSFORMER,
    sampler: str | None = SAMPLER,
    sampler_arg: list[str] = SAMPLER_ARGUMENTS,
    dtype: str = DTYPE,
    device: str = DEVICE,
) -> None:
    """Check parity, then time the pipeline uncached and compiled in turn, and print the plan."""
    import torch

    import harmonica_rt as hrt
    from harmonica_rt.cli.loading import PipelineChoice
    from harmonica_rt.demo.measure import compare

    choice = PipelineChoice(model, transformer, sampler, tuple(sampler_arg), dtype, device)
    case = _Case.load(choice, read(schedule), arg, guidance)

    def generate() -> Any:
        return case.pipeline(**case.arguments, generator=torch.Generator().manual_seed(seed))

    how: dict[str, Any] = {"lowering": lowering, "graphs": graphs, "on_other_steps": on_other_steps}
    parity = case.checked_parity(**how, seed=seed)
    hrt.compile(case.pipeline, case.schedule, **how, strict=True)
    compiled = hrt.get_compiled(case.pipeline)
    with console.status("warm up") as status:
        latency = compare(
            case.pipeline,
            compiled,
            generate,
            repeats=repeats,
            begun=lambda number: status.update(f"round {number} of {repeats}"),
        )
    console.print(str(compiled.report()))
    console.print(str(parity))
    console.print(latency_table(latency))
