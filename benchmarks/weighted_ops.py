"""The ops with weights to measure: two values of each reused site, as a Taylor series of first order takes them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import kernel_ops
from benchmarks.kernel_ops import Op
from harmonica_kernels import forecast, residual_reuse, residual_reuse_norm_modulate
from harmonica_kernels.forecast.reference import forecast_reference
from harmonica_kernels.residual_reuse.reference import residual_sum

PER_GATE = 2  # values of a site


class Weighted(NamedTuple):
    """Arguments of an op.

    Attributes:
        plain: those without weights: K gates, PER_GATE * K caches.
        weights: fp32 [PER_GATE * K].
        places: of the caches.
        counts: caches per gate.
    """

    plain: kernel_ops.Arguments
    weights: Tensor
    places: list[int]
    counts: list[int]


def _draw(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, count: int) -> Weighted:
    plain = kernel_ops.draw(shape, dtype, device, count)
    others = [torch.randn(shape, device=device).to(dtype) for _ in range((PER_GATE - 1) * count)]
    caches = [*plain.caches, *others]
    weights = torch.randn(len(caches), device=device)
    return Weighted(plain._replace(caches=caches), weights, list(range(len(caches))), [PER_GATE] * count)


def _draw_one(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, count: int) -> Weighted:
    """A single site with `count` values."""
    plain = kernel_ops.draw(shape, dtype, device, count)
    return Weighted(plain, torch.randn(count, device=device), list(range(count)), [count])


def _summed(a: Weighted) -> Tensor:
    return residual_sum(*a.plain[:3], *a[1:])


def _eager(a: Weighted) -> Tensor:
    total, caches, weights = a.plain.x, iter(a.plain.caches), iter(a.weights.to(a.plain.x.dtype))
    for gate, count in zip(a.plain.gates, a.counts, strict=True):
        y = next(weights) * next(caches)
        for _ in range(count - 1):
            y = y + next(weights) * next(caches)
        total = total + gate * y
    return total


def _modulated(hidden: Tensor, a: Weighted) -> Tensor:
    scale, shift = a.plain.scale.to(hidden.dtype), a.plain.shift.to(hidden.dtype)
    return functional.layer_norm(hidden, hidden.shape[-1:]) * (1 + scale) + shift


def _run_norm(a: Weighted) -> tuple[Tensor, ...]:
    weighting = {"weights": a.weights, "places": a.places, "counts": a.counts}
    return residual_reuse_norm_modulate(*a.plain[:3], scale=a.plain.scale, shift=a.plain.shift, **weighting)  # type: ignore[arg-type]


def _summed_and_normed(a: Weighted) -> tuple[Tensor, ...]:
    hidden = _summed(a)
    return hidden.to(a.plain.x.dtype), _modulated(hidden, a).to(a.plain.x.dtype)


def _eager_sum_and_norm(a: Weighted) -> tuple[Tensor, ...]:
    hidden = _eager(a)
    return hidden, _modulated(hidden, a)


def _eager_forecast(a: Weighted) -> Tensor:
    terms = (w * c for w, c in zip(a.weights.to(a.plain.x.dtype), a.plain.caches, strict=True))
    total: Tensor = functools.reduce(torch.add, terms)
    return total


# Traffic of eager PyTorch: a product with a weight reads and writes a tensor (2), a sum reads two and writes one (3).
OPS = (
    Op(
        "residual_reuse with two weights",
        lambda a: (residual_reuse(*a.plain[:3], *a[1:]),),
        lambda a: (_summed(a).to(a.plain.x.dtype),),
        lambda a: (_eager(a),),
        tensors=lambda count: PER_GATE * count + 2,
        passes=lambda count: 12 * count,
        targets={"cpu": "at least 0.85", "cuda": "at least 0.9"},
        draw=_draw,
        against_eager="at least 0.8",
    ),
    Op(
        "residual_reuse_norm_modulate with two weights",
        _run_norm,
        _summed_and_normed,
        _eager_sum_and_norm,
        tensors=lambda count: PER_GATE * count + 3,
        passes=lambda count: 12 * count + 6,
        targets={"cpu": "at least 0.7", "cuda": "at least 0.9"},
        draw=_draw,
    ),
    Op(
        "forecast",
        lambda a: (forecast(a.plain.caches, a.weights, a.places),),
        lambda a: (forecast_reference(a.plain.caches, a.weights, a.places),),
        lambda a: (_eager_forecast(a),),
        tensors=lambda count: count + 1,
        passes=lambda count: 5 * count - 3,
        targets={"cpu": "at least 0.85", "cuda": "at least 0.9"},
        draw=_draw_one,
        most=4,
    ),
)
