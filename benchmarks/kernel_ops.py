"""The ops to measure: their arguments, what they are compared with, and the memory traffic of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from harmonica_kernels import gated_residual, residual_reuse, residual_reuse_norm_modulate
from harmonica_kernels.residual_reuse.reference import residual_sum


class Arguments(NamedTuple):
    """Arguments of an op. `scale` and `shift` are used by `residual_reuse_norm_modulate` only.

    Attributes:
        x: [B, N, D].
        caches: K tensors [B, N, D].
        gates: K tensors [B, 1, D].
        scale: [B, 1, D].
        shift: [B, 1, D].
    """

    x: Tensor
    caches: list[Tensor]
    gates: list[Tensor]
    scale: Tensor
    shift: Tensor


Provider = Callable[[Any], tuple[Tensor, ...]]
Draw = Callable[[tuple[int, int, int], torch.dtype, torch.device, int], Any]


def draw(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, count: int) -> Arguments:
    """Random arguments with `count` caches; gates, scale and shift are chunks of one tensor, as adaLN makes them."""
    batch, _, width = shape
    x, *caches = (torch.randn(shape, device=device).to(dtype) for _ in range(count + 1))
    chunks = torch.randn(batch, 1, (count + 2) * width, device=device).to(dtype).chunk(count + 2, dim=-1)
    scale, shift, *gates = chunks
    return Arguments(x, caches, gates, scale, shift)


@dataclass(frozen=True)
class Op:
    """An op and what it is compared with.

    Attributes:
        name: name of the op.
        run: the op.
        reference: its definition, which Inductor compiles.
        eager: the eager operators that a model runs in its place.
        tensors: number of tensors of the size of `x` that the op must move, given the number of caches.
        passes: number of such tensors that eager PyTorch moves.
        targets: wanted share of copy bandwidth, by device.
        draw: makes random arguments, given shape, dtype, device and number of caches.
        against_eager: wanted speed against eager PyTorch, as a share of `passes / tensors`.
        most: the most caches that are measured, or gates where each has several caches.
    """

    name: str
    run: Provider
    reference: Provider
    eager: Provider
    tensors: Callable[[int], int]
    passes: Callable[[int], int]
    targets: dict[str, str] = field(default_factory=dict)
    draw: Draw = draw
    against_eager: str | None = None
    most: int = 8


def _norm_modulate(hidden: Tensor, a: Arguments) -> Tensor:
    return functional.layer_norm(hidden, hidden.shape[-1:]) * (1 + a.scale.to(hidden.dtype)) + a.shift.to(hidden.dtype)


def _summed(a: Arguments) -> tuple[Tensor, ...]:
    return (residual_sum(a.x, a.caches, a.gates).to(a.x.dtype),)


def _summed_and_normed(a: Arguments) -> tuple[Tensor, ...]:
    hidden = residual_sum(a.x, a.caches, a.gates)
    return hidden.to(a.x.dtype), _norm_modulate(hidden, a).to(a.x.dtype)


def _eager_sum(a: Arguments) -> Tensor:
    total = a.x
    for cache, gate in zip(a.caches, a.gates, strict=True):
        total = total + gate * cache
    return total


def _eager_sum_and_norm(a: Arguments) -> tuple[Tensor, ...]:
    hidden = _eager_sum(a)
    return hidden, _norm_modulate(hidden, a)


# Traffic of eager PyTorch: per cache, the cache is read and its product written (2 tensors), then product and sum are
# read and the new sum is written (3 more); the norm, its product and its sum each read and write another tensor.
OPS = (
    Op(
        "gated_residual",
        lambda a: (gated_residual(a.x, a.caches[0], a.gates[0]),),
        _summed,
        lambda a: (_eager_sum(a),),
        tensors=lambda count: 3,
        passes=lambda count: 5,
        targets={"cpu": "at least 0.85", "cuda": "at least 0.9"},
        most=1,
    ),
    Op(
        "residual_reuse",
        lambda a: (residual_reuse(a.x, a.caches, a.gates),),
        _summed,
        lambda a: (_eager_sum(a),),
        tensors=lambda count: count + 2,
        passes=lambda count: 5 * count,
        targets={"cpu": "at least 0.85", "cuda": "at least 0.9"},
        against_eager="at least 0.8",
    ),
    Op(
        "residual_reuse_norm_modulate",
        lambda a: residual_reuse_norm_modulate(a.x, a.caches, a.gates, scale=a.scale, shift=a.shift),
        _summed_and_normed,
        _eager_sum_and_norm,
        tensors=lambda count: count + 3,
        passes=lambda count: 5 * count + 6,
        targets={"cpu": "at least 0.7", "cuda": "at least 0.9"},
    ),
)
