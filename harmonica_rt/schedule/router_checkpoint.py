"""Reads router checkpoints of the released HarmoniCa and Learning-to-Cache code; imports torch when it reads one.

Hazard: a checkpoint is a pickle with tensors beside it, and a pickle can run code. It is read as data by
`untrusted.torch_archive`: nothing that it names is imported or called, and no row can be longer than the data that the
file holds for it. What the rows mean is decided in `routers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.format import ScheduleFileNotFoundError
from harmonica_rt.untrusted.pickle_data import Call, ForbiddenNameError
from harmonica_rt.untrusted.text import one_line, quoted
from harmonica_rt.untrusted.torch_archive import FLOATING, ArchiveError, StoredTensor, TorchArchive, tensor_of

MAX_LOGITS = 2**20  # per file: 1,000 steps of 500 blocks


@dataclass(frozen=True)
class RouterCheckpoint:
    """What a router checkpoint holds.

    Attributes:
        logits: fp32 `[rows, 2 * depth]`, rows in the order of the file.
        probabilities: the sigmoid of `logits`, computed by torch.
        args: the arguments of the training; empty if the file has none.
        bare: whether the file holds only the routers.
    """

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    args: Mapping[str, object]
    bare: bool


def read_checkpoint(source: str) -> RouterCheckpoint:
    """Read the file `source`; errors name it.

    Raises:
        ScheduleFileNotFoundError: there is no such file.
        ScheduleError: the file is not a router checkpoint, cannot be read without running code, has missing or ragged
            rows or non-finite numbers, or holds more than `MAX_LOGITS` logits.
    """
    import torch

    try:
        with TorchArchive(source) as archive:
            routers, args, bare = _parts(archive.content, source)
            logits = torch.from_numpy(_logits(archive, routers, args, source))
    except FileNotFoundError as error:
        raise ScheduleFileNotFoundError(f"{source}: no such router checkpoint") from error
    except ForbiddenNameError as error:
        raise ScheduleError(
            f"{source}: refused. Only tensors, plain values and argparse.Namespace are read; this file asks "
            f"for {one_line(error.name)}, and loading that could run code from the file"
        ) from error
    except ArchiveError as error:
        raise ScheduleError(f"{source}: not a readable torch checkpoint: {error}") from error
    # torch's own sigmoid, in fp32 as in the released code: at the threshold, one ulp decides
    return RouterCheckpoint(logits.numpy(), logits.sigmoid().numpy(), args, bare)


def _parts(content: object, source: str) -> tuple[Mapping[object, object], Mapping[str, object], bool]:
    """The routers, the training arguments, and whether the file holds only the routers."""
    if not isinstance(content, dict):
        raise ScheduleError(f"{source}: expected a router checkpoint (a dict), got {_kind(content)}")
    bare = "routers" not in content
    routers = content if bare else content["routers"]
    if not isinstance(routers, dict) or not routers:
        raise ScheduleError(f"{source}: expected router logits under 'routers', got {_kind(routers)}")
    args = None if bare else content.get("args")
    if isinstance(args, Call) and args.function == "argparse.Namespace":
        args = args.state
    return routers, args if isinstance(args, dict) else {}, bare


def _kind(value: object) -> str:
    """A phrase that says what a value of the archive is."""
    found = tensor_of(value)
    return found if isinstance(found, str) else "a tensor"


def _logits(
    archive: TorchArchive, routers: Mapping[object, object], args: Mapping[str, object], source: str
) -> NDArray[np.float32]:
    """The rows `{i}.prob`, stacked: fp32 `[rows, 2 * depth]`. No data is read before all shapes are checked."""
    tensors: dict[int, StoredTensor] = {}
    for key, value in routers.items():
        match = re.fullmatch(r"(0|[1-9]\d{0,5})\.prob", key, re.ASCII) if isinstance(key, str) else None
        if match is None:
            raise ScheduleError(f"{source}: routers: expected keys '0.prob', '1.prob', ..., got {quoted(key)}")
        tensors[int(match[1])] = _check_row(value, f"{source}: routers[{key!r}]")
    claimed = args.get("num_sampling_steps")
    total = max(max(tensors) + 1, claimed if type(claimed) is int and claimed < 100_000 else 0)
    if missing := [row for row in range(total) if row not in tensors]:
        listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise ScheduleError(f"{source}: routers: expected rows 0 ... {total - 1}, missing {listed}")
    widths = [tensors[row].shape[0] for row in range(total)]
    if ragged := [row for row in range(total) if widths[row] != widths[0]]:
        raise ScheduleError(
            f"{source}: routers: rows must be equally long; row 0 has {quoted(widths[0])} logits, "
            f"row {ragged[0]} has {quoted(widths[ragged[0]])}"
        )
    if widths[0] < 1 or widths[0] % 2:
        raise ScheduleError(
            f"{source}: routers: expected two logits per block (attention, MLP), got {quoted(widths[0])} in a row"
        )
    if total * widths[0] > MAX_LOGITS:
        raise ScheduleError(
            f"{source}: routers: {total} rows of {quoted(widths[0])} logits are more than any model has; "
            f"at most {MAX_LOGITS} are read"
        )
    rows = []
    for row in range(total):
        try:
            rows.append(archive.vector(tensors[row]))
        except ArchiveError as error:
            raise ScheduleError(f"{source}: routers['{row}.prob']: {error}") from error
        if not np.isfinite(rows[-1]).all():
            raise ScheduleError(f"{source}: routers: row {row} is not finite")
    return np.stack(rows)


def _check_row(value: object, field: str) -> StoredTensor:
    """The row as the file describes it; ScheduleError unless it is a vector of floating-point numbers."""
    tensor = tensor_of(value)
    if isinstance(tensor, str):
        raise ScheduleError(f"{field}: expected a tensor of logits, got {tensor}")
    if len(tensor.shape) != 1 or tensor.dtype not in FLOATING:
        raise ScheduleError(
            f"{field}: expected a row of floating-point logits, got shape {quoted(tensor.shape)}, "
            f"dtype torch.{one_line(tensor.dtype)}"
        )
    return tensor
