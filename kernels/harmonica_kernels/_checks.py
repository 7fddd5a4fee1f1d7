"""Checks the arguments of the ops, and raises errors with the same messages for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(op: str, x: torch.Tensor, *, name: str = "x") -> None:
    """Raise TypeError unless `x`, which all other arguments must match, has a supported dtype."""
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected one of {allowed}")


def check_same(op: str, x: torch.Tensor, name: str, tensor: torch.Tensor, *, of: str = "x") -> None:
    """Raise TypeError or ValueError unless `tensor` has the shape, the dtype and the device of `x`, called `of`."""
    _check_shape(op, name, tensor, x.shape, f"that of {of}")
    check_like(op, x, name, tensor, of=of)


def check_broadcasts(op: str, x: torch.Tensor, name: str, tensor: torch.Tensor | None) -> None:
    """Raise TypeError or ValueError unless `tensor` is None, or matches `x` and has a shape that broadcasts to x."""
    if tensor is None:
        return
    check_like(op, x, name, tensor)
    if not broadcasts_to(tensor.shape, x.shape):
        raise ValueError(
            f"{op}: {name} has shape {list(tensor.shape)}, which does not broadcast to that of x, "
            f"{list(x.shape)}; expected e.g. [B, 1, D] or [D]"
        )


def check_width(op: str, x: torch.Tensor, name: str, tensor: torch.Tensor | None) -> None:
    """Raise TypeError or ValueError unless `tensor` is None, or matches `x` and has shape [D], the last size of `x`."""
    if tensor is None:
        return
    check_like(op, x, name, tensor)
    _check_shape(op, name, tensor, x.shape[-1:], "the last size of x")


def check_residual_sum(
    op: str,
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor | None],
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
    counts: Sequence[int] = (),
) -> None:
    """Raise TypeError or ValueError unless the ops support this sum, as `residual_reuse` defines it."""
    check_dtype(op, x)
    if not caches:
        raise ValueError(f"{op}: caches is empty, expected at least one tensor like x")
    if not counts and len(gates) != len(caches):
        raise ValueError(
            f"{op}: got {len(gates)} gates for {len(caches)} caches; give each cache a gate, None where it has none"
        )
    if counts and (len(counts) != len(gates) or min(counts) < 1 or sum(counts) != len(caches)):
        raise ValueError(
            f"{op}: counts is {list(counts)} for {len(gates)} gates and {len(caches)} caches; give each gate the "
            "number of its caches, at least 1"
        )
    for k, cache in enumerate(caches):
        check_same(op, x, f"caches[{k}]", cache)
    for k, gate in enumerate(gates):
        check_broadcasts(op, x, f"gates[{k}]", gate)
    check_weights(op, x, weights, places, len(caches))


def check_weights(
    op: str, x: torch.Tensor, weights: torch.Tensor | None, places: Sequence[int], count: int, *, of: str = "x"
) -> None:
    """Raise TypeError or ValueError unless `weights` has a number for each of `count` caches at its place.

    Without weights there are no places. A place of -1 stands for a factor of 1. Messages call `x` `of`.
    """
    if weights is None:
        if places:
            raise ValueError(f"{op}: got {len(places)} places without weights; give both or neither")
        return
    if weights.dtype != torch.float32:
        raise TypeError(f"{op}: weights has dtype {weights.dtype}, expected torch.float32, whatever that of {of} is")
    if weights.device != x.device:
        raise ValueError(f"{op}: weights is on {weights.device}, {of} is on {x.device}; move one of them")
    if len(places) != count:
        raise ValueError(
            f"{op}: got {len(places)} places for {count} caches; give each cache the place of its weight, -1 for none"
        )
    for k, place in enumerate(places):
        if not -1 <= place < weights.numel():
            raise ValueError(
                f"{op}: places[{k}] is {place}, expected -1 or the index of one of {weights.numel()} weights"
            )


def check_like(op: str, x: torch.Tensor, name: str, tensor: torch.Tensor, *, of: str = "x") -> None:
    """Raise TypeError or ValueError unless `tensor` has the dtype and the device of `x`, which messages call `of`."""
    if tensor.dtype != x.dtype:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected that of {of}, {x.dtype}; cast it")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, {of} is on {x.device}; move one of them")


def _check_shape(op: str, name: str, tensor: torch.Tensor, expected: torch.Size, what: str) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {what}, {list(expected)}")


def broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of `shape` broadcasts to `target` without changing it."""
    if len(shape) > len(target):
        return False
    trailing = zip(reversed(shape), reversed(target), strict=False)
    return all(size == 1 or size == wanted for size, wanted in trailing)
