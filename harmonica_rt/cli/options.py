"""Arguments and options that several commands share, and the checks of where they write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

PICTURES = (".png", ".svg", ".pdf")

MODEL: Any = typer.Argument(..., metavar="MODEL_DIR", help="A directory that a pipeline was saved in.")
SCHEDULE: Any = typer.Argument(..., metavar="SCHEDULE", help="A schedule file.")
ARGUMENTS: Any = typer.Option([], "--arg", metavar="NAME=VALUE", help="An argument of the call; may be repeated.")
GUIDANCE: Any = typer.Option(None, help="Guidance scale (default: the pipeline's own).")
REPEATS: Any = typer.Option(5, min=1, help="Timed rounds.")
SEED: Any = typer.Option(0, min=0, max=2**63 - 1, help="Seed of everything that is random.")
DTYPE: Any = typer.Option("fp32", help="fp32, bf16 or fp16.")
LOWERING: Any = typer.Option(
    "fused",
    help="fused (equal up to rounding), inductor (the same, compiled) or plain (slower, bit for bit on CPU).",
)
DEVICE: Any = typer.Option("cpu", help="Where to run: cpu, cuda or cuda:N.")


def writable(path: Path) -> Path:
    """The path, if a file can be put there: a run of minutes must not end at its last line."""
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent} to write {path.name} in")
    if not os.access(path.parent, os.W_OK):
        raise typer.BadParameter(f"the directory {path.parent} may not be written in")
    return path


def writable_picture(path: Path) -> Path:
    """The path, if a picture can be put there."""
    if path.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"expected a name that ends in {', '.join(PICTURES)}, got {path.name}")
    return writable(path)


SCHEDULE_OUT: Any = typer.Argument(
    ..., metavar="FILE", dir_okay=False, writable=True, callback=writable, help="Where the schedule goes."
)
