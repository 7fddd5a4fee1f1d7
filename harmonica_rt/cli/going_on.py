"""Tells the user how to continue a training that was interrupted."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harmonica_training import TrainingInterrupted


def how_to_go_on(stop: TrainingInterrupted, work: Path | None, out: Path) -> str:
    """A message that says what was saved of an interrupted training, and the command that continues it.

    Args:
        stop: the interruption.
        work: the directory of its checkpoints. If None, a checkpoint is written to a new directory beside `out`, or to
            a temporary directory if that is not possible.
        out: the file that its schedule was to be written to.

    Raises:
        OSError: the checkpoint cannot be written.
    """
    from harmonica_training.checkpoint import save_checkpoint

    path, arguments = stop.path, sys.argv[1:]
    if path is None and stop.checkpoint is not None:
        try:
            path = save_checkpoint(_new_directory(out), stop.checkpoint)
        except OSError:  # nothing can be written there
            path = save_checkpoint(tempfile.mkdtemp(prefix=f"{out.stem}-"), stop.checkpoint)
        arguments = [*arguments, "--work", str(path.parent)]
    if path is not None:
        return f"interrupted after iteration {stop.iteration}, saved in {path}; to continue:\n{command(arguments)}"
    if stop.iteration:
        return f"interrupted; iteration {stop.iteration} is saved in {work}; to continue:\n{command(arguments)}"
    return "interrupted before the first iteration ended: there is nothing to save"


def command(arguments: Sequence[str]) -> str:
    """This command line with `arguments`, quoted for a shell; under torchrun, its own options are unknown here."""
    program = [sys.argv[0]]
    if Path(program[0]).name == "__main__.py":
        program = [sys.executable, "-m", "harmonica_rt.cli"]
    elif (found := shutil.which("harmonica-rt")) and os.path.realpath(found) == os.path.realpath(program[0]):
        program = ["harmonica-rt"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"torchrun (with the options as before) -m harmonica_rt.cli {shlex.join(arguments)}"
    return shlex.join([*program, *arguments])


def _new_directory(out: Path) -> Path:
    """`schedule.work` beside `schedule.json`, or `schedule.work-2` and so on if that exists."""
    directory, number = out.with_suffix(".work"), 2
    while directory.exists():
        directory, number = out.with_suffix(f".work-{number}"), number + 1
    return directory
