"""Tensors whose memory is not what they are: negated or conjugated views, and zeros without memory.

PyTorch makes them ordinary before it calls an op, but not inside a list of optional tensors, which gates are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harmonica_kernels import gated_residual, residual_reuse, residual_reuse_norm_modulate

OPS = [op.__name__ for op in (gated_residual, residual_reuse, residual_reuse_norm_modulate)]
SHAPE = (2, 3, 8)


def negated(t: Tensor) -> Tensor:
    """Equal to `t`, with the opposite numbers in memory."""
    view = torch.complex(torch.zeros_like(t, dtype=_real(t)), -t.to(_real(t))).conj().imag
    assert view.is_neg()
    return view if view.dtype == t.dtype else torch._neg_view(-t)


def conjugated(t: Tensor) -> Tensor:
    """Equal to `t`: the real part of a conjugated view, every second number of its memory."""
    return torch.complex(t.to(_real(t)), t.to(_real(t))).conj().real.to(t.dtype)


def zero(t: Tensor) -> Tensor:
    """Zeros of the shape of `t` that have no memory."""
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def _real(t: Tensor) -> torch.dtype:
    return t.dtype if t.dtype in (torch.float32, torch.float64) else torch.float32


KINDS: dict[str, Callable[[Tensor], Tensor]] = {"negated": negated, "conjugated": conjugated, "zero": zero}


def arguments(op: str, dtype: torch.dtype) -> list[Any]:
    """One of each argument that the op takes, two terms for those that add up a list."""
    x, *terms = torch.randn(3, *SHAPE).to(dtype).unbind()
    gates = [torch.randn(2, 1, 8).to(dtype), torch.randn(8).to(dtype)]
    vectors = [torch.randn(8).to(dtype) for _ in range(4)]
    if op == "gated_residual":
        return [x, terms[0], gates[0]]
    return [x, terms, gates, *(vectors if op.endswith("modulate") else [])]


def places(given: list[Any]) -> list[tuple[int, ...]]:
    """Where the tensors among the arguments are."""
    return [
        (index, *inner)
        for index, value in enumerate(given)
        for inner in ([(i,) for i in range(len(value))] if isinstance(value, list) else [()])
    ]


def replaced(given: list[Any], chosen: set[tuple[int, ...]], by: Callable[[Tensor], Tensor]) -> list[Any]:
    """The arguments with the tensors at the chosen places replaced."""
    return [
        [by(t) if (index, k) in chosen else t for k, t in enumerate(value)]
        if isinstance(value, list)
        else (by(value) if (index,) in chosen else value)
        for index, value in enumerate(given)
    ]


def check(run: Callable[..., Any], given: list[Any], kind: str) -> None:
    """Each argument alone, and all of them at once, against ordinary tensors of the same values."""
    lazy = KINDS[kind]
    every = places(given)
    for chosen in ({place} for place in every), [set(every)]:
        for these in chosen:
            changed = replaced(given, these, lazy)
            expected = run(*replaced(given, these, lambda t: lazy(t).clone()))
            found = run(*changed)
            for a, b in zip(_results(found), _results(expected), strict=True):
                assert not a.is_neg()
                assert not a._is_zerotensor()
                assert torch.equal(a, b), f"{kind} at {these}"
                memory = {t.data_ptr() for t in _results(changed) if not t._is_zerotensor()}
                assert a.data_ptr() not in memory


def _results(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return list(itertools.chain.from_iterable(map(_results, value)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["{}", "_{}_reference"], ids=["op", "reference"])
def test_ops_read_values_not_memory(name: str, op: str, dtype: torch.dtype, kind: str) -> None:
    run = getattr(torch.ops.harmonica, name.format(op)).default
    check(run, arguments(op, dtype), kind)


def test_results_differ_where_arguments_do() -> None:
    """The comparison above would be worth nothing between ops that did not see their gates."""
    x, caches, gates = arguments("residual_reuse", torch.float32)
    plain = torch.ops.harmonica.residual_reuse(x, caches, gates)
    assert not torch.equal(plain, torch.ops.harmonica.residual_reuse(x, caches, [-gates[0], gates[1]]))
    assert torch.equal(plain, torch.ops.harmonica.residual_reuse(x, caches, [negated(gates[0]), negated(gates[1])]))
