"""Commands around a pipeline: `demo`, `sites`, `recipes`, `verify`, `bench`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from harmonica_rt.cli.console import console, line, unwrapped
from harmonica_rt.cli.options import (
    ARGUMENTS,
    DEVICE,
    DTYPE,
    GUIDANCE,
    LOWERING,
    MODEL,
    PATTERN,
    RECIPE,
    REPEATS,
    SAMPLER,
    SAMPLER_ARGUMENTS,
    SCHEDULE,
    SEED,
    TRANSFORMER,
    one_of,
    writable_picture,
)
from harmonica_rt.cli.schedule import read
from harmonica_rt.errors import HarmonicaError

if TYPE_CHECKING:
    from harmonica_rt.demo.measure import Comparison
    from harmonica_rt.demo.run import DemoResult
    from harmonica_rt.parity.report import ParityReport
    from harmonica_rt.schedule import Schedule


def demo(
    model: Path | None = typer.Option(None, metavar="DIR", help="A DiTPipeline directory (default: bundled)."),
    schedule: Path | None = typer.Option(
        None, metavar="FILE", help="A schedule file (default: the learned one; every(2) with --model or --steps)."
    ),
    out: Path = typer.Option(
        Path("harmonica-demo.png"),
        metavar="PNG",
        dir_okay=False,
        writable=True,
        callback=writable_picture,
        help="Where the picture goes.",
    ),
    steps: int | None = typer.Option(None, min=1, help="Denoising steps, under every(2)."),
    batch: int = typer.Option(10, min=1, help="Images: classes 0, 1, 2, ... in turn."),
    repeats: int = REPEATS,
    seed: int = SEED,
) -> None:
    """Sample the bundled model uncached, with the reference and compiled; compare, time, draw."""
    with console.status("load libraries"):
        import harmonica_rt as hrt
        from harmonica_rt.cli.loading import calling, load_pipeline
        from harmonica_rt.demo import bundled_model, bundled_schedule
        from harmonica_rt.demo.run import guidance_of, run_demo

    directory = model or bundled_model()
    pipeline = load_pipeline(directory)
    if type(pipeline).__name__ != "DiTPipeline":
        raise HarmonicaError(f"the demo is for a DiTPipeline, {directory} holds a {type(pipeline).__name__}; see bench")
    if schedule is not None:
        chosen = read(schedule)
        if steps not in (None, chosen.steps):
            raise HarmonicaError(f"--steps says {steps}, and {schedule} is for {chosen.steps} steps; leave --steps out")
    elif model is None and steps is None:
        chosen = hrt.Schedule.load(bundled_schedule())
    else:
        chosen = hrt.Schedule.every(2, steps=steps or 20, sites=hrt.find_sites(pipeline.transformer))
    with console.status("begin") as status:

        def say(what: str) -> None:
            console.print(f"- {what}", style="dim")
            status.update(what)

        def count(number: int) -> None:
            if console.is_terminal:
                status.update(f"round {number} of {repeats}")
            else:
                console.print(f"  round {number} of {repeats}", style="dim")

        labels = tuple(i % 10 for i in range(batch))
        guidance = guidance_of(directory)
        try:
            with calling(pipeline, {"class_labels": list(labels), "guidance_scale": guidance}):
                result = run_demo(
                    pipeline,
                    chosen,
                    labels=labels,
                    guidance=guidance,
                    seed=seed,
                    repeats=repeats,
                    picture=out,
                    say=say,
                    count=count,
                )
        except hrt.ParityError as error:
            console.print(line((str(error), "bold red"), "\nspeed-up withheld: images differ"))
            raise typer.Exit(1) from None
    _print_demo(result)


def sites(
    model: Path = MODEL,
    pattern: list[str] = PATTERN,
) -> None:
    """List the cacheable sub-layers of a pipeline's denoiser, in execution order."""
    from collections import Counter

    from harmonica_rt import find_sites
    from harmonica_rt.cli.loading import load_denoiser
    from harmonica_rt.schedule.producers import site_kind

    denoiser = load_denoiser(model)
    found = find_sites(denoiser, pattern or None)
    for site in found:
        unwrapped(site)
    kinds = Counter(site_kind(site) for site in found)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    console.print(line((f"{len(found)} sites of {type(denoiser).__name__}", "bold"), f": {counted}"))


def recipes() -> None:
    """List the known set-ups that `--recipe` takes."""
    from rich.padding import Padding

    from harmonica_rt import recipes

    for name in recipes.known():
        recipe = recipes.read(name)
        unwrapped(name)
        if recipe.model is not None:
            unwrapped(f"    model: {recipe.model}")
        console.print(Padding(recipe.about, (0, 0, 1, 4)))


def verify(
    model: Path = MODEL,
    schedule: Path = SCHEDULE,
    recipe: list[str] = RECIPE,
    arg: list[str] = ARGUMENTS,
    guidance: float | None = GUIDANCE,
    lowering: str = LOWERING,
    seed: int = SEED,
    tolerance: str = typer.Option("auto", help="exact, measured or auto (exact for plain on CPU)."),
    transformer: str | None = TRANSFORMER,
    sampler: str | None = SAMPLER,
    sampler_arg: list[str] = SAMPLER_ARGUMENTS,
    dtype: str = DTYPE,
    device: str = DEVICE,
) -> None:
    """Hold a schedule's compiled run against the reference, step by step; exit status 1 where they differ."""
    from typing import get_args

    from harmonica_rt.cli.loading import call_arguments, load_pipeline
    from harmonica_rt.parity.lockstep import Tolerance

    one_of("--tolerance", tolerance, get_args(Tolerance))
    chosen = read(schedule)
    pipeline = load_pipeline(
        model, dtype, device, transformer=transformer, sampler=sampler, sampler_arguments=sampler_arg
    )
    arguments = call_arguments(pipeline, arg, chosen.steps, guidance)
    report = _checked_parity(pipeline, chosen, arguments, lowering=lowering, seed=seed, tolerance=tolerance)
    console.print(_parity_table(report))
    console.print(str(report), style="bold green")


def bench(
    model: Path = MODEL,
    schedule: Path = SCHEDULE,
    recipe: list[str] = RECIPE,
    arg: list[str] = ARGUMENTS,
    guidance: float | None = GUIDANCE,
    lowering: str = LOWERING,
    repeats: int = REPEATS,
    seed: int = SEED,
    transformer: str | None = TRANSFORMER,
    sampler: str | None = SAMPLER,
    sampler_arg: list[str] = SAMPLER_ARGUMENTS,
    dtype: str = DTYPE,
    device: str = DEVICE,
) -> None:
    """Time a pipeline uncached and compiled in turn, and print the plan; parity is checked first."""
    import torch

    import harmonica_rt as hrt
    from harmonica_rt.cli.loading import call_arguments, load_pipeline
    from harmonica_rt.demo.measure import compare

    chosen = read(schedule)
    pipeline = load_pipeline(
        model, dtype, device, transformer=transformer, sampler=sampler, sampler_arguments=sampler_arg
    )
    arguments = call_arguments(pipeline, arg, chosen.steps, guidance)

    def generate() -> Any:
        return pipeline(**arguments, generator=torch.Generator().manual_seed(seed))

    parity = _checked_parity(pipeline, chosen, arguments, lowering=lowering, seed=seed)
    hrt.compile(pipeline, chosen, lowering=lowering, strict=True)
    compiled = hrt.get_compiled(pipeline)
    with console.status("warm up") as status:
        latency = compare(
            pipeline,
            compiled,
            generate,
            repeats=repeats,
            begun=lambda number: status.update(f"round {number} of {repeats}"),
        )
    console.print(str(compiled.report()))
    console.print(str(parity))
    console.print(_latency_table(latency))


def _checked_parity(pipeline: Any, schedule: Schedule, arguments: dict[str, Any], **options: Any) -> ParityReport:
    """The report of a passed check; where it fails, the command ends with exit status 1."""
    import harmonica_rt as hrt
    from harmonica_rt.cli.loading import calling

    try:
        with console.status("reference and compiled, side by side"), calling(pipeline, arguments):
            return hrt.verify(pipeline, schedule, **options, **arguments)
    except hrt.ParityError as error:
        console.print(str(error), style="bold red")
        raise typer.Exit(1) from None


def _print_demo(result: DemoResult) -> None:
    plan = result.report.plans[-1]
    console.print(_latency_table(result.latency))
    psnr = "equal" if math.isinf(result.psnr) else f"{result.psnr:.1f} dB PSNR"
    rows = {
        "parity": str(result.parity),
        "CUR": f"{result.report.last_cur or 0:.1%} of all entries reused in the last run",
        "cache": f"{plan.memory.arena_bytes / 2**20:.2f} MiB in {plan.memory.slots} slots (lower bound "
        f"{plan.memory.lower_bound_bytes / 2**20:.2f} MiB)",
        "compile": f"{plan.times.total:.1f} s, {plan.programs} step programs",
        "images": f"{len(result.labels)} at guidance {result.guidance:g}; cached against uncached: {psnr}",
        "picture": str(result.picture),
    }
    for name, text in rows.items():
        unwrapped(line((f"{name:8}", "bold"), " ", (text, "green" if name == "parity" else "")))


def _latency_table(latency: Comparison) -> Any:
    import torch
    from rich.table import Table

    from harmonica_rt.demo.measure import median, spread

    repeats = len(latency.uncached.pipeline)
    table = Table(
        "", "uncached", "compiled", "speed-up", title=f"median of {repeats} rounds, {torch.get_num_threads()} threads"
    )
    for name, plain, planned, ratio in (
        ("denoiser", latency.uncached.denoiser, latency.compiled.denoiser, latency.denoiser_speedup),
        ("whole pipeline", latency.uncached.pipeline, latency.compiled.pipeline, latency.pipeline_speedup),
    ):
        cells = []
        for seconds in (plain, planned):
            low, high = spread(seconds)
            cells.append(f"{median(seconds) * 1e3:.0f} ms ({low * 1e3:.0f} - {high * 1e3:.0f})")
        table.add_row(name, *cells, f"{ratio:.2f}x")
    table.add_row("theoretical (FLOPs)", "", "", f"{latency.theoretical:.2f}x")
    table.add_row("denoiser, realised / theoretical", "", "", f"{latency.realised:.2f}")
    return table


def _parity_table(report: Any) -> Any:
    from rich.table import Table

    table = Table("step", "same bits", "rms error", "largest error", "allowed (rms, largest)")
    for step in report.steps:
        allowed = f"{step.limit.rms:.3g}, {step.limit.largest:.3g}"
        bits = "yes" if step.same_bits else "no"
        table.add_row(str(step.step), bits, f"{step.error.rms:.3g}", f"{step.error.largest:.3g}", allowed)
    return table
