"""Saves and loads checkpoints of a training; a kill at any moment leaves a valid one, and loading one runs no code.

Hazard: a process may die between any two writes, and a partial file must never be taken for a checkpoint. So each
checkpoint is written beside its final place, synced to disk, and moved there atomically; the previous one is deleted
only after that. A file is plain safetensors with JSON in its header.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from harmonica_rt.untrusted import strict_json
from harmonica_rt.untrusted.text import one_line, quoted
from harmonica_training import safetensors_file
from harmonica_training.errors import CheckpointError

FORMAT_VERSION = "1"

_VERSION_KEY = "harmonica_checkpoint_version"
_RECORD_KEY = "harmonica_checkpoint"
_NAME = re.compile(r"iteration-([0-9]{6,})\.safetensors")
_UNFINISHED = ".unfinished"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that a training needs to continue as if it had not been interrupted.

    Attributes:
        iteration: number of iterations done.
        tensors: logits, optimiser moments, lambda, states of random generators, in any shape and any dtype that
            safetensors supports, kept bit for bit. Loaded tensors are on the CPU.
        values: plain JSON that is loaded back equal: lists instead of tuples, strings as keys, finite floats.
    """

    iteration: int
    tensors: dict[str, Tensor]
    values: dict[str, object]

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """The tensor of this name.

        Raises:
            CheckpointError: it is missing, differs from `like` in shape or dtype, or is not finite.
        """
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(f"{name} is missing")
        if found.shape != like.shape or found.dtype != like.dtype:
            raise CheckpointError(
                f"{name}: expected shape {tuple(like.shape)} of {like.dtype}, got {quoted(tuple(found.shape))} of "
                f"{found.dtype}"
            )
        if not bool(found.isfinite().all()):
            raise CheckpointError(f"{name} holds numbers that are not finite")
        return found

    def digest(self) -> int:
        """A 63-bit number that differs if anything in the checkpoint differs."""
        content = hashlib.sha256(json.dumps([self.iteration, self.values], sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return int.from_bytes(content.digest()[:8], "big") >> 1


class TrainingInterrupted(KeyboardInterrupt):
    """A training was interrupted (Ctrl-C); what it had learned so far is kept.

    Attributes:
        iteration: number of iterations done, including those of earlier processes.
        checkpoint: the state after the last finished iteration, for `save_checkpoint`; None if this process finished
            none.
        path: the file that the checkpoint was written to; None without a directory, and in all processes but the first.
    """

    def __init__(self, iteration: int, checkpoint: Checkpoint | None, path: Path | None) -> None:
        kept = (
            "its state is in `.checkpoint`"
            if path is None
            else f"to continue, call train again with directory={path.parent}"
        )
        super().__init__(f"interrupted after iteration {iteration}" + (f"; {kept}" if checkpoint else ""))
        self.iteration = iteration
        self.checkpoint = checkpoint
        self.path = path


def save_checkpoint(directory: str | os.PathLike[str], checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write `iteration-000120.safetensors` into `directory`, then delete all but the newest `keep` checkpoints.

    Args:
        directory: a directory for this training only; created if it does not exist.
        checkpoint: what to save.
        keep: how many checkpoints to keep there, including this one; at least 1.

    Returns:
        the file.

    Raises:
        ValueError: `keep` or the iteration is too small.
        CheckpointError: `values` is not plain JSON, or the directory holds a checkpoint of a later iteration, which
            would be mistaken for the newest of this training.
        OSError: the file cannot be written; earlier checkpoints are untouched.
    """
    if keep < 1 or checkpoint.iteration < 0:
        raise ValueError(f"keep must be 1 or more and the iteration 0 or more, got {keep} and {checkpoint.iteration}")
    directory = Path(directory)
    data = _encode(checkpoint)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"iteration-*{_UNFINISHED}"):
        leftover.unlink()
    saved = _saved(directory)
    if saved and max(saved) > checkpoint.iteration:
        raise CheckpointError(
            f"cannot save iteration {checkpoint.iteration} in {directory}: it holds {saved[max(saved)].name}, of a "
            f"later iteration or of another training; delete that file, or pass another directory"
        )

    path = directory / file_name(checkpoint.iteration)
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:  # the error of a full disk names no file
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    _sync_directory(directory)
    saved[checkpoint.iteration] = path
    for iteration in sorted(saved)[:-keep]:
        saved[iteration].unlink()
    return path


def file_name(iteration: int) -> str:
    """The file name of an iteration's checkpoint."""
    return f"iteration-{iteration:06d}.safetensors"


def latest_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint | None:
    """The readable checkpoint of the highest iteration in `directory`; None if there are no checkpoints.

    A broken one (left by a faulty disk, never by a kill) is skipped with a warning in the log.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    failure: CheckpointError | None = None
    for iteration, path in sorted(_saved(Path(directory)).items(), reverse=True):
        try:
            checkpoint = load_checkpoint(path)
            if checkpoint.iteration != iteration:
                raise CheckpointError(f"{path} holds iteration {checkpoint.iteration}: renamed or damaged; delete it")
        except CheckpointError as error:
            failure = failure or error
            logger.warning("skipping a checkpoint: %s", error)
        else:
            return checkpoint
    if failure is not None:
        raise failure
    return None


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read what `save_checkpoint` wrote.

    Raises:
        CheckpointError: the file does not exist, is not safetensors, is truncated, is not a checkpoint of this package,
            or has another version of its format.
    """
    try:
        tensors, metadata = safetensors_file.read(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except safetensors_file.UnreadableError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); delete it, and resume from the one before"
        ) from error
    missing = [key for key in (_VERSION_KEY, _RECORD_KEY) if key not in metadata]
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of a training: its header lacks {', '.join(missing)}")
    if metadata[_VERSION_KEY] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint in version {one_line(metadata[_VERSION_KEY])} of the format; this release reads "
            f"version {FORMAT_VERSION}; continue with the release that wrote it, or start anew"
        )
    iteration, values = _decode(metadata[_RECORD_KEY], path)
    return Checkpoint(iteration, tensors, values)


def _encode(checkpoint: Checkpoint) -> bytes:
    record = {"iteration": checkpoint.iteration, "values": checkpoint.values}
    try:
        text = json.dumps(record, allow_nan=False)
        again = strict_json.parse(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the values of a checkpoint must be plain JSON with finite numbers: {error}") from error
    if again != record:
        raise CheckpointError(
            "the values of a checkpoint must come back from JSON as they are: use lists for tuples, and strings as keys"
        )
    # Copies, because safetensors accepts neither views nor tensors that share memory.
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in checkpoint.tensors.items()}
    data: bytes = safetensors.torch.save(tensors, {_VERSION_KEY: FORMAT_VERSION, _RECORD_KEY: text})
    return data


def _decode(text: str, path: str | os.PathLike[str]) -> tuple[int, dict[str, object]]:
    try:
        record = strict_json.parse(text)
    except strict_json.JsonError as error:
        raise CheckpointError(f"the header of {path} holds no JSON under {_RECORD_KEY}: {error}") from error
    match record:
        case {"iteration": int(iteration), "values": dict(values)} if iteration >= 0 and iteration is not True:
            return iteration, values
    raise CheckpointError(f"the header of {path} lacks the iteration or the values under {_RECORD_KEY}")


def _saved(directory: Path) -> dict[int, Path]:
    """Finished checkpoints by iteration."""
    found = ((_NAME.fullmatch(path.name), path) for path in directory.glob("iteration-*.safetensors"))
    return {int(match.group(1)): path for match, path in found if match}


def _sync_directory(directory: Path) -> None:
    """Sync the move itself to disk, so that later deletions cannot reach the disk first."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
