"""Norms behind residuals under autocast, which give fp32 and are rounded by the linear layers that read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harmonica_rt.lower.fuse import fuse
from tests.lower.test_fuse import Body, assert_within, body, calls

HALF = (torch.bfloat16, torch.float16)
NORM = "residual_reuse_norm_modulate"


def low(tensor: Tensor) -> Tensor:
    """In the half type, as what linear layers give under autocast; the exact values stay as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype("cpu"))


def modulated(m: Body, x: Tensor, g: Tensor, s: Tensor, b: Tensor) -> Tensor:
    total = low(x) + low(g) * m.attn(x)
    wide = total if total.dtype == torch.float64 else total.float()  # as autocast does on CUDA, but not on a CPU
    return m.plain(wide) * (1 + low(s)) + low(b)


READERS: dict[str, tuple[Callable[..., Any], bool]] = {
    "linear": (lambda m, n: m.ff(n), True),
    "two linears": (lambda m, n: m.ff(n) + m.attn(n), True),
    "linear and product": (lambda m, n: m.ff(n) * n, False),
    "linear and result": (lambda m, n: (m.ff(n), n), False),
    "sine": (lambda m, n: m.ff(n.sin()), False),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_a_norm_that_autocast_rounds(reader: str, dtype: torch.dtype) -> None:
    read, fits = READERS[reader]

    def form(m: Body, x: Tensor, g: Tensor, h: Tensor, s: Tensor, b: Tensor) -> Any:
        return read(m, modulated(m, x, g, s, b))

    with torch.autocast("cpu", dtype):
        subject = body(form, torch.float32)
        step = subject.specialise(())
        fused = fuse(step)
        eager, got = (subject.run(each, {}) for each in (step, fused.step))
    double = body(form, torch.float64, values=torch.float32)
    assert calls(fused) == ({NORM: 1} if fits else {"gated_residual": 1})
    assert_within(got, eager, double.run(double.specialise(()), {}))
