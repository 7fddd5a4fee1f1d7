"""Router checkpoints of the released code, read as schedules; torch is imported when a file is read.

A DiT checkpoint is `{"routers": state_dict, "opt", "args"}`; `routers["{i}.prob"]` holds `2 * depth` logits,
even = attention, odd = MLP. The hazards, all of which give a plausible wrong mask:

- `i` is the respaced timestep, so row T - 1 runs *first*: step s reads row T - 1 - s.
- HarmoniCa (arXiv 2410.01723) uses every row; row T - 1 is fixed at 5.0.
- Learning-to-Cache (arXiv 2406.01733) empties its cache at every odd `i`: those rows are untrained noise, all
  compute.
- Its U-ViT is a bare state dict whose rows run *forwards* and number solver steps of two evaluations each:
  evaluation 2k, for k >= 1, uses row k; every other evaluation computes all; rows from T / 2 on are noise.

A checkpoint is a pickle: it is read by torch's weights-only unpickler with one more class,
`argparse.Namespace`, and never otherwise.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import check_number
from harmonica_rt.schedule.format import ScheduleFileNotFoundError
from harmonica_rt.schedule.provenance import MadeBy, ModelInfo, ScheduleFields

if TYPE_CHECKING:
    import torch

RouterKind = Literal["auto", "harmonica", "l2c-dit", "l2c-uvit"]

FIXED_LOGIT = 5.0  # HarmoniCa's row for the first step
# what torch's readers were seen to raise on damaged bytes
_BROKEN_FILE = (RuntimeError, EOFError, LookupError, ValueError, AttributeError, TypeError, struct.error)
_DIT = "DiTTransformer2DModel"
_THRESHOLDS = {
    "harmonica": 0.1,
    "l2c-dit": 0.1,
    "l2c-uvit": 0.9,
}  # --thres in the commands of the released code
_METHODS = {"harmonica": "harmonica", "l2c-dit": "learning-to-cache", "l2c-uvit": "learning-to-cache"}
_HYPER_PARAMETERS = (
    "model", "image_size", "lr", "l1", "max_steps", "global_batch_size", "ste_threshold",
    "lambda_c", "cfg_scale",
)  # fmt: skip


@dataclass(frozen=True)
class _Checkpoint:
    """fp32 `[rows, 2 * depth]` in the file's own order; `args` is empty where the file has none."""

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    args: Mapping[str, object]
    bare: bool


def read_router(
    path: str | os.PathLike[str],
    *,
    sites: tuple[str, ...] | None = None,
    steps: int | None = None,
    threshold: float | None = None,
    kind: RouterKind = "auto",
) -> ScheduleFields:
    """Read a router checkpoint; a site is computed where `sigmoid(logit) > threshold`.

    Args:
        path: the checkpoint.
        sites: their names, attention and MLP of each block in turn; by default those of diffusers'
            `DiTTransformer2DModel`, or of the original U-ViT.
        steps: number of steps the file must be for (T routers each).
        threshold: tau, 0 <= tau < 1; by default that of the released commands: 0.1, for U-ViT 0.9.
        kind: which code wrote the file; `auto` tells by its contents, or asks.

    Raises:
        ScheduleFileNotFoundError: there is no such file.
        ScheduleError: the file is no router checkpoint, needs code to be run to be read, has missing or
            ragged rows, does not fit `sites` or `steps`, or its kind cannot be told.
    """
    if kind not in get_args(RouterKind):
        raise ScheduleError(f"kind: expected one of {', '.join(get_args(RouterKind))}, got {kind!r}")
    source = os.fspath(path)
    checkpoint = _read(source)
    rows, width = checkpoint.logits.shape
    found = _kind_of(checkpoint, source) if kind == "auto" else kind
    if steps is not None and rows != steps:
        raise ScheduleError(f"{source}: the file has routers for {rows} steps, steps={steps} was asked for")
    if sites is not None and len(sites) != width:
        raise ScheduleError(
            f"{source}: the routers are for {width // 2} blocks ({width} sites), {len(sites)} sites were "
            f"given; give the attention and the MLP of each block in turn"
        )
    tau = check_number(_THRESHOLDS[found] if threshold is None else threshold, "threshold")
    if not 0 <= tau < 1:
        raise ScheduleError(f"threshold: expected 0 <= threshold < 1, got {tau}")
    used = _rows_of_steps(checkpoint, found, source)
    over = checkpoint.probabilities > np.float32(tau)
    compute = np.array([np.ones(width, np.bool_) if row is None else over[row] for row in used])
    if not compute[0].all():
        raise ScheduleError(
            f"{source}: row {used[0]} runs first and must compute all, but {int((~compute[0]).sum())} of "
            f"{width} logits are under the threshold {tau}; is the file of another kind than {found!r}?"
        )
    args = checkpoint.args
    known = {name: args[name] for name in _HYPER_PARAMETERS if isinstance(args.get(name), bool | int | float | str)}
    scores = [None if row is None else checkpoint.logits[row].tolist() for row in used]
    fields = ScheduleFields(
        compute=compute,
        sites=sites or _default_sites(found, width // 2, source),
        made_by=MadeBy(_METHODS[found], known, threshold=tau, scores=scores),
    )
    if sites is None:
        fields["model"] = ModelInfo("UViT" if found == "l2c-uvit" else _DIT)
    if "cfg_scale" in known:
        fields["guidance"] = check_number(known["cfg_scale"], f"{source}: args.cfg_scale")
    return fields


def _kind_of(checkpoint: _Checkpoint, source: str) -> Literal["harmonica", "l2c-dit", "l2c-uvit"]:
    """Told by what only one of the trainers writes; where that speaks for none, or for two, an error."""
    fixed = bool((checkpoint.logits[-1] == FIXED_LOGIT).all())
    odd_depth = checkpoint.logits.shape[1] // 2 % 2 == 1
    if checkpoint.bare and odd_depth and not fixed:
        return "l2c-uvit"  # a U-ViT has a middle block, hence an odd number of blocks
    trained_without_images = "lambda_c" in checkpoint.args
    trained_on_images = "data_path" in checkpoint.args and not trained_without_images
    if fixed and not trained_on_images:
        return "harmonica"
    if trained_on_images and not fixed:
        return "l2c-dit"
    writer = "of Learning-to-Cache" if trained_on_images else "none that tell"
    writer = "of HarmoniCa" if trained_without_images else writer
    raise ScheduleError(
        f"{source}: cannot tell which code wrote this file (its last row is {'' if fixed else 'not '}fixed "
        f"at {FIXED_LOGIT}, its args are {writer}); pass kind='harmonica', 'l2c-dit' or 'l2c-uvit'"
    )


def _rows_of_steps(checkpoint: _Checkpoint, kind: str, source: str) -> list[int | None]:
    """The row that each step reads, in the order the steps run; None = compute all."""
    total = len(checkpoint.logits)
    if kind == "harmonica":
        return [*reversed(range(total))]
    if total % 2:
        raise ScheduleError(f"{source}: Learning-to-Cache pairs the steps, so their number must be even, got {total}")
    if kind == "l2c-dit":
        return [row if row % 2 == 0 else None for row in reversed(range(total))]
    return [step // 2 if step % 2 == 0 and step else None for step in range(total)]


def _default_sites(kind: str, depth: int, source: str) -> tuple[str, ...]:
    if kind != "l2c-uvit":
        return tuple(f"transformer_blocks.{block}.{name}" for block in range(depth) for name in ("attn1", "ff"))
    if depth % 2 == 0:
        raise ScheduleError(f"{source}: a U-ViT has an odd number of blocks, got {depth}; pass sites= to name them")
    half = range(depth // 2)
    blocks = [*(f"in_blocks.{b}" for b in half), "mid_block", *(f"out_blocks.{b}" for b in half)]
    return tuple(f"{block}.{name}" for block in blocks for name in ("attn", "mlp"))


def _read(source: str) -> _Checkpoint:
    content = _load(source)
    if not isinstance(content, Mapping):
        raise ScheduleError(f"{source}: expected a router checkpoint (a dict), got {type(content).__name__}")
    bare = "routers" not in content
    routers = content if bare else content["routers"]
    if not isinstance(routers, Mapping) or not routers:
        raise ScheduleError(f"{source}: expected router logits under 'routers', got {type(routers).__name__}")
    args = content.get("args") if not bare else None
    known = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    logits = _logits(routers, known, source)
    # torch's own sigmoid, in fp32 like the released code: at the threshold one ulp decides
    return _Checkpoint(logits.numpy(), logits.sigmoid().numpy(), known, bare)


def _load(source: str) -> object:
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ScheduleFileNotFoundError(f"{source}: no such router checkpoint") from error
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise ScheduleError(f"{source}: not a readable torch checkpoint") from error
        raise ScheduleError(
            f"{source}: refused. Only tensors, plain values and argparse.Namespace are read; this file asks "
            f"for {wanted[1]}, and to load that could run code the file brings"
        ) from error
    except _BROKEN_FILE as error:
        raise ScheduleError(f"{source}: not a readable torch checkpoint ({type(error).__name__})") from error


def _logits(routers: Mapping[object, object], args: Mapping[str, object], source: str) -> torch.Tensor:
    """The rows `{i}.prob`, stacked: fp32 `[rows, 2 * depth]`."""
    import torch

    rows: dict[int, torch.Tensor] = {}
    for key, value in routers.items():
        match = re.fullmatch(r"(0|[1-9]\d{0,5})\.prob", key) if isinstance(key, str) else None
        if match is None:
            raise ScheduleError(f"{source}: routers: expected keys '0.prob', '1.prob', ..., got {key!r}")
        rows[int(match[1])] = _check_row(value, f"{source}: routers[{key!r}]")
    claimed = args.get("num_sampling_steps")
    total = max(max(rows) + 1, claimed if type(claimed) is int and claimed < 100_000 else 0)
    if missing := [row for row in range(total) if row not in rows]:
        listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise ScheduleError(f"{source}: routers: expected rows 0 ... {total - 1}, missing {listed}")
    widths = {row: len(rows[row]) for row in range(total)}
    if ragged := [row for row in widths if widths[row] != widths[0]]:
        raise ScheduleError(
            f"{source}: routers: rows must be equally long; row 0 has {widths[0]} logits, "
            f"row {ragged[0]} has {widths[ragged[0]]}"
        )
    if widths[0] == 0 or widths[0] % 2:
        raise ScheduleError(
            f"{source}: routers: expected two logits a block (attention, MLP), got {widths[0]} in a row"
        )
    logits = torch.stack([rows[row].detach().float() for row in range(total)])
    if not bool(logits.isfinite().all()):
        raise ScheduleError(f"{source}: routers: row {int((~logits.isfinite()).nonzero()[0, 0])} is not finite")
    return logits


def _check_row(value: object, field: str) -> torch.Tensor:
    import torch

    if not isinstance(value, torch.Tensor):
        raise ScheduleError(f"{field}: expected a tensor of logits, got {type(value).__name__}")
    if value.ndim != 1 or not value.is_floating_point():
        raise ScheduleError(
            f"{field}: expected a row of floating-point logits, got shape {tuple(value.shape)}, dtype {value.dtype}"
        )
    return value
