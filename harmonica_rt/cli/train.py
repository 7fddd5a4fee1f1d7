"""`harmonica-rt train`: learn a schedule for a saved pipeline."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from harmonica_rt.cli import signals
from harmonica_rt.cli.conditions import Subjects, chosen_conditions
from harmonica_rt.cli.console import console, line, print_unwrapped, tell
from harmonica_rt.cli.going_on import how_to_go_on
from harmonica_rt.cli.keeping import save_anywhere
from harmonica_rt.cli.options import (
    ARGUMENTS,
    DEVICE,
    DTYPE,
    GUIDANCE,
    MODEL,
    PATTERN,
    RECIPE,
    SAMPLER,
    SAMPLER_ARGUMENTS,
    SEED,
    TRANSFORMER,
    one_of,
    writable,
    writable_directory,
)
from harmonica_rt.cli.schedule import read
from harmonica_rt.errors import HarmonicaError

if TYPE_CHECKING:
    from harmonica_training import TrainingResult
    from harmonica_training.progress import Progress

_HOW_MUCH = "How much to cache (one of them)"
_WHAT = "What to generate"
_HOW = "How to train"
_OWN_OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "class_labels": "--labels",
    "prompt": "--prompts",
}
"""Arguments of the call that `--arg` may not set here -> the options that set them."""


def train(
    ctx: typer.Context,
    model: Path = MODEL,
    out: Path = typer.Argument(
        ..., metavar="SCHEDULE", dir_okay=False, writable=True, callback=writable, help="Where the schedule is written."
    ),
    recipe: list[str] = RECIPE,
    steps: int = typer.Option(20, min=2, help="Denoising steps."),
    target_speedup: float | None = typer.Option(
        None, min=1.0, help="Theoretical speed-up to reach.", rich_help_panel=_HOW_MUCH
    ),
    target_cur: float | None = typer.Option(
        None, min=0.0, max=1.0, help="Share of entries to reuse.", rich_help_panel=_HOW_MUCH
    ),
    beta: float | None = typer.Option(
        None, min=0.0, help="A fixed price of computing, instead of a target.", rich_help_panel=_HOW_MUCH
    ),
    labels: str | None = typer.Option(
        None, help="Class labels, such as 0,1,2 (default: all that the pipeline knows).", rich_help_panel=_WHAT
    ),
    prompts: Path | None = typer.Option(
        None, exists=True, dir_okay=False, help="A text file, one prompt per line.", rich_help_panel=_WHAT
    ),
    embeddings: Path | None = typer.Option(
        None, exists=True, dir_okay=False, help="A safetensors file of encoded prompts.", rich_help_panel=_WHAT
    ),
    guidance: float | None = GUIDANCE,
    arg: list[str] = ARGUMENTS,
    pattern: list[str] = PATTERN,
    iterations: int = typer.Option(
        100, min=1, help="Number of iterations, each one sampling run.", rich_help_panel=_HOW
    ),
    batch: int = typer.Option(8, min=1, help="Samples per run, over all processes.", rich_help_panel=_HOW),
    learning_rate: float = typer.Option(0.1, min=0.0, help="Learning rate of AdamW.", rich_help_panel=_HOW),
    image_error: str = typer.Option(
        "sensitivity",
        help="How IEPO's lambda is measured: sensitivity, leave-one-out, progressive, or none.",
        rich_help_panel=_HOW,
    ),
    gates: str = typer.Option(
        "hard", help="hard: train on what will run; soft: blend by r, as the paper does.", rich_help_panel=_HOW
    ),
    coherence: float = typer.Option(
        1.0, min=0.0, max=1.0, help="How far the sites of a step move together (paper: 0).", rich_help_panel=_HOW
    ),
    renew_every: int = typer.Option(5, min=1, help="Iterations between renewals of lambda.", rich_help_panel=_HOW),
    exchanges: int = typer.Option(
        8, min=0, help="Pairs of steps of the best schedule that are exchanged per iteration.", rich_help_panel=_HOW
    ),
    validation_batches: int = typer.Option(
        1, min=1, help="Number of batches that the images of a schedule are measured on.", rich_help_panel=_HOW
    ),
    tau: float = typer.Option(0.1, min=0.0, max=1.0, help="Compute where r > tau.", rich_help_panel=_HOW),
    start: Path | None = typer.Option(None, help="A schedule file to start from.", rich_help_panel=_HOW),
    precision: str = typer.Option(
        "fp32", help="Autocast of the forward passes: fp32 (none), bf16 or fp16.", rich_help_panel=_HOW
    ),
    checkpointing: bool = typer.Option(
        False, help="Checkpoint activations: less memory, more time.", rich_help_panel=_HOW
    ),
    work: Path | None = typer.Option(
        None,
        file_okay=False,
        callback=writable_directory,
        help="Directory of checkpoints and of the TensorBoard log; a training found there is continued.",
        rich_help_panel=_HOW,
    ),
    checkpoint_every: int = typer.Option(50, min=1, help="Iterations between checkpoints.", rich_help_panel=_HOW),
    seed: int = SEED,
    transformer: str | None = TRANSFORMER,
    sampler: str | None = SAMPLER,
    sampler_arg: list[str] = SAMPLER_ARGUMENTS,
    dtype: str = DTYPE,
    device: str = DEVICE,
) -> None:
    """Learn a cache schedule (HarmoniCa), without images; `torchrun -m harmonica_rt.cli train` shares the work."""
    with console.status("load libraries"):
        from harmonica_rt.cli.calling import call_arguments, calling
        from harmonica_rt.cli.loading import PipelineChoice, load_pipeline
        from harmonica_rt.schedule import ScheduleSet
        from harmonica_training import TrainConfig, TrainingInterrupted, train
        from harmonica_training.console_progress import ConsoleProgress
        from harmonica_training.distributed import leave, rank
        from harmonica_training.progress import Several

    one_of("--image-error", image_error, ["sensitivity", "leave-one-out", "progressive", "none"])
    one_of("--gates", gates, ["hard", "soft"])
    one_of("--precision", precision, ["fp32", "bf16", "fp16"])
    choices: dict[str, Any] = {
        "image_error": None if image_error == "none" else image_error,
        "gates": gates,
        "precision": precision,
    }
    config = TrainConfig(
        steps=steps,
        **_how_much(ctx),
        guidance=guidance,
        patterns=tuple(pattern) or None,
        coherence=coherence,
        renew_every=renew_every,
        iterations=iterations,
        batch=batch,
        learning_rate=learning_rate,
        exchanges=exchanges,
        validation_batches=validation_batches,
        tau=tau,
        checkpointing=checkpointing,
        checkpoint_every=checkpoint_every,
        seed=seed,
        **choices,
    )
    for pair in arg:
        if own := _OWN_OPTIONS.get(pair.partition("=")[0]):
            raise HarmonicaError(f"--arg {pair}: use {own} instead")
    beginning = read(start) if start else None
    if isinstance(beginning, ScheduleSet):
        beginning = beginning.resample(steps)
    choice = PipelineChoice(model, transformer, sampler, tuple(sampler_arg), dtype, _own_device(device))
    pipeline = load_pipeline(choice)
    given = call_arguments(pipeline, arg, steps, guidance)
    for name in _OWN_OPTIONS:
        given.pop(name, None)
    config = replace(config, arguments=given)
    with calling(pipeline, given):
        conditions = chosen_conditions(pipeline, config, Subjects(labels, prompts, embeddings))
    try:
        with calling(pipeline, given):
            result = train(
                pipeline,
                config,
                conditions=conditions,
                start=beginning,
                directory=work,
                progress=Several(ConsoleProgress(), *_logs(work)),
            )
        if rank() == 0:
            save_anywhere(result.schedule, out, work)
            _print_result(result, out)
    except TrainingInterrupted as stop:
        if rank() == 0:
            tell(how_to_go_on(stop, work, out))
        cause = stop.__cause__
        raise typer.Exit(signals.exit_status(cause if isinstance(cause, KeyboardInterrupt) else stop)) from None
    finally:
        leave()


def _logs(work: Path | None) -> list[Progress]:
    """The TensorBoard log in the directory of the checkpoints; without TensorBoard none, and a message says so."""
    from harmonica_training import TrainingError
    from harmonica_training.tensorboard_log import TensorBoardLog

    if work is None:
        return []
    try:
        return [TensorBoardLog(work / "log")]
    except TrainingError as error:
        if os.environ.get("RANK", "0") == "0":
            tell(f"only checkpoints are written, no TensorBoard log: {error}")
        return []


def _how_much(ctx: typer.Context) -> dict[str, Any]:
    """The one option that sets how much to cache: from the command line, or else from a recipe."""
    given = {
        name: ctx.params[name] for name in ("target_speedup", "target_cur", "beta") if ctx.params[name] is not None
    }
    sources = {name: ctx.get_parameter_source(name) for name in given}
    own = {name: given[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    chosen = own or given
    if len(chosen) != 1:
        options = [f"--{name.replace('_', '-')}" for name in chosen]
        got = f", not {' and '.join(options)}" if options else ""
        raise HarmonicaError(f"give one of --target-speedup, --target-cur and --beta{got}")
    return chosen


def _own_device(device: str) -> str:
    """The device of this process: under torchrun each process has its own."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def _print_result(result: TrainingResult, out: Path) -> None:
    from harmonica_rt.schedule import render

    console.print(render(result.schedule))
    print_unwrapped(
        line(
            (str(out), "bold"),
            f": theoretical speed-up {result.speedup:.3f}x, CUR {result.schedule.cur:.1%}, "
            f"beta {result.beta:.3g} at the end",
        )
    )
