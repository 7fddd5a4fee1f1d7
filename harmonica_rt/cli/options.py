"""Arguments and options that several commands share, and checks that their files can be written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.untrusted.text import one_line, quoted

PICTURES = (".png", ".svg", ".pdf")

MODEL: Any = typer.Argument(
    ..., metavar="MODEL", help="A directory that a pipeline was saved in, or its id on the Hugging Face hub."
)
SCHEDULE: Any = typer.Argument(
    ...,
    metavar="SCHEDULE",
    help="A schedule file, a directory with a schedule.json, or a set: its file, or a directory of schedule files.",
)
STEPS: Any = typer.Option(
    None, min=1, help="Draw the schedule for this number of steps: that of a set, or one that is resampled."
)
OTHER_STEPS: Any = typer.Option(
    "error", help="For another number of steps than there are schedules for: error, resample, or plain (uncached)."
)
PATTERN: Any = typer.Option(
    [], help="A glob over module paths that chooses the sites, instead of the built-in rule; may be repeated."
)
LEVEL: Any = typer.Option(
    None, help="What the sites are: sublayer (the default), block, span (a list of blocks as one) or output."
)
ARGUMENTS: Any = typer.Option(
    [], "--arg", metavar="NAME=VALUE", help="An argument of the pipeline's call; may be repeated."
)
GUIDANCE: Any = typer.Option(None, help="Guidance scale (default: the pipeline's own).")
REPEATS: Any = typer.Option(5, min=1, help="Number of timed rounds.")
SEED: Any = typer.Option(0, min=0, max=2**63 - 1, help="Seed of everything that is random.")
SAMPLER: Any = typer.Option(None, help="Class of the scheduler, such as DDIMScheduler (default: the pipeline's own).")
SAMPLER_ARGUMENTS: Any = typer.Option(
    [], "--sampler-arg", metavar="NAME=VALUE", help="A field of the scheduler's config; may be repeated."
)
TRANSFORMER: Any = typer.Option(None, help="A denoiser that replaces the pipeline's: a directory, or an id on the hub.")
DTYPE: Any = typer.Option("fp32", help="Dtype of all components: fp32, bf16 or fp16.")
LOWERING: Any = typer.Option(
    "fused",
    help="fused (equal up to rounding), inductor (the same, compiled) or plain (slower, bit for bit on CPU).",
)
GRAPHS: Any = typer.Option(
    "auto",
    help="CUDA graphs: auto (unless they measure slower), on or off. Without a CUDA device there are none.",
)
DEVICE: Any = typer.Option("cpu", help="Where to run: cpu, cuda or cuda:N.")


def _take_recipes(ctx: typer.Context, names: list[str]) -> list[str]:
    """Make the options of the recipes defaults of the command; if two recipes set an option, the later one wins.

    `--recipe` is eager, so it is read before the options whose defaults it changes.
    """
    from harmonica_rt.recipes import read

    known = {parameter.name: bool(getattr(parameter, "multiple", False)) for parameter in ctx.command.params}
    chosen: dict[str, Any] = {}
    for name in names:
        recipe = read(name)
        options = {**recipe.options, **(recipe.train if ctx.info_name == "train" else {})}
        if unknown := sorted(set(options) - set(known)):
            raise HarmonicaError(
                f"recipe {name}: the command {ctx.info_name} has no option {one_line(', '.join(unknown))}"
            )
        for option, value in options.items():
            if isinstance(value, list) != known[option]:
                expected = "a list" if known[option] else "one value"
                raise HarmonicaError(f"recipe {name}: {option}: expected {expected}, got {quoted(value)}")
        chosen.update(options)
    ctx.default_map = {**(ctx.default_map or {}), **chosen}
    return names


RECIPE: Any = typer.Option(
    [],
    is_eager=True,
    callback=_take_recipes,
    metavar="NAME|FILE",
    help="A recipe, whose options are defaults of this command (`harmonica-rt recipes` lists some); may be repeated.",
)


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    """Raise HarmonicaError if the value of an option is not one of the known ones."""
    if value not in known:
        raise HarmonicaError(f"{option} {value} is not known; choose one of {', '.join(known)}")


def writable(path: Path) -> Path:
    """The path, if a file can be written there; BadParameter if not, so that minutes of work do not end in an error."""
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent} to write {path.name} in")
    if not path.exists() or path.is_file():  # and not a device or a pipe
        _try_to_write_in(path.parent)
    return path


def _try_to_write_in(folder: Path) -> None:
    """Raise BadParameter if no file can be made in a folder; its mode does not show that (/proc, a quota, root)."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(f"the directory {folder} cannot be written to ({error.strerror or error})") from error


def writable_directory(path: Path | None) -> Path | None:
    """The path, if it is a directory that can be written in or can be made; else BadParameter."""
    if path is not None:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise typer.BadParameter(f"{there} is a file, so there can be no directory {path}")
        _try_to_write_in(there)
    return path


def writable_picture(path: Path) -> Path:
    """The path, if a picture can be written there; else BadParameter."""
    if path.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"expected a name that ends in {', '.join(PICTURES)}, got {path.name}")
    return writable(path)


SCHEDULE_OUT: Any = typer.Argument(
    ..., metavar="FILE", dir_okay=False, writable=True, callback=writable, help="Where the schedule is written."
)
