"""`harmonica-rt demo`: sample the bundled model uncached, with the reference and compiled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from harmonica_rt.cli.console import console, line, print_unwrapped
from harmonica_rt.cli.options import REPEATS, SEED, writable_picture
from harmonica_rt.cli.schedule import read_one
from harmonica_rt.cli.tables import latency_table
from harmonica_rt.errors import HarmonicaError

if TYPE_CHECKING:
    from harmonica_rt.demo.run import DemoResult


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
        help="Where the picture is written (.png, .svg, .pdf).",
    ),
    steps: int | None = typer.Option(None, min=1, help="Denoising steps; the schedule is then every(2)."),
    batch: int = typer.Option(10, min=1, help="Number of images, of classes 0, 1, 2, ... in turn."),
    repeats: int = REPEATS,
    seed: int = SEED,
) -> None:
    """Sample the bundled model uncached, with the reference and compiled; compare and time them, and draw a picture."""
    with console.status("load libraries"):
        import harmonica_rt as hrt
        from harmonica_rt.cli.calling import calling
        from harmonica_rt.cli.loading import PipelineChoice, load_pipeline
        from harmonica_rt.demo import bundled_model, bundled_schedule
        from harmonica_rt.demo.run import DemoRequest, guidance_of, run_demo

    directory = model or bundled_model()
    pipeline = load_pipeline(PipelineChoice(directory))
    if type(pipeline).__name__ != "DiTPipeline":
        raise HarmonicaError(
            f"the demo needs a DiTPipeline, but {directory} holds a {type(pipeline).__name__}; "
            "`harmonica-rt bench` runs any pipeline"
        )
    if schedule is not None:
        chosen = read_one(schedule, steps)
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
        request = DemoRequest(labels=labels, guidance=guidance, seed=seed, repeats=repeats, picture=out)
        try:
            with calling(pipeline, {"class_labels": list(labels), "guidance_scale": guidance}):
                result = run_demo(pipeline, chosen, request, say=say, count=count)
        except hrt.ParityError as error:
            console.print(line((str(error), "bold red"), "\nspeed-up withheld: images differ"))
            raise typer.Exit(1) from None
    _print_demo(result)


def _print_demo(result: DemoResult) -> None:
    request, plan = result.request, result.report.plans[-1]
    console.print(latency_table(result.latency))
    psnr = "equal" if math.isinf(result.psnr) else f"{result.psnr:.1f} dB PSNR"
    rows = {
        "parity": str(result.parity),
        "CUR": f"{result.report.last_cur or 0:.1%} of all entries reused in the last run",
        "cache": f"{plan.memory.arena_bytes / 2**20:.2f} MiB in {plan.memory.slots} slots (lower bound "
        f"{plan.memory.lower_bound_bytes / 2**20:.2f} MiB)",
        "compile": f"{plan.times.total:.1f} s, {plan.programs} step programs",
        "images": f"{len(request.labels)} at guidance {request.guidance:g}; cached against uncached: {psnr}",
        "picture": str(request.picture),
    }
    for name, text in rows.items():
        print_unwrapped(line((f"{name:8}", "bold"), " ", (text, "green" if name == "parity" else "")))
