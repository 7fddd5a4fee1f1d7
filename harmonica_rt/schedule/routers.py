"""Makes schedules from router checkpoints of the released HarmoniCa and Learning-to-Cache code.

A DiT checkpoint is `{"routers": state_dict, "opt", "args"}`; `routers["{i}.prob"]` holds `2 * depth` logits,
even = attention, odd = MLP. There are several hazards, each of which gives a plausible but wrong mask:

- `i` is the respaced timestep, so row T - 1 runs *first*: step s reads row T - 1 - s.
- HarmoniCa (arXiv 2410.01723) uses every row; row T - 1 is fixed at 5.0.
- Learning-to-Cache (arXiv 2406.01733) empties its cache at every odd `i`: those rows are untrained noise, and their
  steps compute all sites.
- Its U-ViT checkpoint is a bare state dict whose rows run *forwards* and number solver steps of two evaluations each:
  evaluation 2k, for k >= 1, uses row k; every other evaluation computes all; rows from T / 2 on are noise.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

import numpy as np

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import check_number
from harmonica_rt.schedule.provenance import MadeBy, ModelInfo, ScheduleFields
from harmonica_rt.schedule.router_checkpoint import RouterCheckpoint, read_checkpoint

RouterKind = Literal["auto", "harmonica", "l2c-dit", "l2c-uvit"]

FIXED_LOGIT = 5.0  # HarmoniCa's row for the first step
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


def read_router(
    path: str | os.PathLike[str],
    *,
    sites: tuple[str, ...] | None = None,
    steps: int | None = None,
    threshold: float | None = None,
    kind: RouterKind = "auto",
) -> ScheduleFields:
    """Make the fields of a schedule from a router checkpoint; a site is computed where `sigmoid(logit) > threshold`.

    Args:
        path: the checkpoint.
        sites: names of the sites, attention and MLP of each block in turn; by default those of diffusers'
            `DiTTransformer2DModel`, or of the original U-ViT.
        steps: number of steps that the file must be for (T routers each).
        threshold: tau, 0 <= tau < 1; by default that of the released commands: 0.1, or 0.9 for U-ViT.
        kind: which code wrote the file; `auto` infers it from the contents, or raises.

    Raises:
        ScheduleFileNotFoundError: there is no such file.
        ScheduleError: the file is not a router checkpoint, cannot be read without running code, has missing or ragged
            rows or non-finite numbers, does not fit `sites` or `steps`, holds more than `MAX_LOGITS` logits, or its
            kind cannot be inferred.
    """
    if kind not in get_args(RouterKind):
        raise ScheduleError(f"kind: expected one of {', '.join(get_args(RouterKind))}, got {kind!r}")
    source = os.fspath(path)
    checkpoint = read_checkpoint(source)
    rows, width = checkpoint.logits.shape
    found = _kind_of(checkpoint, source) if kind == "auto" else kind
    if steps is not None and rows != steps:
        raise ScheduleError(f"{source}: the file has routers for {rows} steps, but steps={steps} was asked for")
    if sites is not None and len(sites) != width:
        raise ScheduleError(
            f"{source}: the routers are for {width // 2} blocks ({width} sites), but {len(sites)} sites were "
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
            f"{source}: row {used[0]} runs first and must compute all sites, but {int((~compute[0]).sum())} of "
            f"{width} scores are not above the threshold {tau}; is the kind of the file really {found!r}?"
        )
    args = checkpoint.args
    known = {name: args[name] for name in _HYPER_PARAMETERS if isinstance(args.get(name), bool | int | float | str)}
    scores = [None if row is None else checkpoint.logits[row].tolist() for row in used]
    try:
        made_by = MadeBy(_METHODS[found], known, threshold=tau, scores=scores)
    except ScheduleError as error:
        raise ScheduleError(f"{source}: args: {error}") from error
    fields = ScheduleFields(compute=compute, sites=sites or _default_sites(found, width // 2, source), made_by=made_by)
    if sites is None:
        fields["model"] = ModelInfo("UViT" if found == "l2c-uvit" else _DIT)
    if "cfg_scale" in known:
        fields["guidance"] = check_number(known["cfg_scale"], f"{source}: args.cfg_scale")
    return fields


def _kind_of(checkpoint: RouterCheckpoint, source: str) -> Literal["harmonica", "l2c-dit", "l2c-uvit"]:
    """The kind, inferred from what only one of the trainers writes; ScheduleError if that fits none, or two."""
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
    writer = "Learning-to-Cache" if trained_on_images else "neither"
    writer = "HarmoniCa" if trained_without_images else writer
    raise ScheduleError(
        f"{source}: cannot tell which code wrote this file (its last row is {'' if fixed else 'not '}fixed "
        f"at {FIXED_LOGIT}, and its args are those of {writer}); pass kind='harmonica', 'l2c-dit' or 'l2c-uvit'"
    )


def _rows_of_steps(checkpoint: RouterCheckpoint, kind: str, source: str) -> list[int | None]:
    """The row that each step reads, in the order in which the steps run; None = compute all."""
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
