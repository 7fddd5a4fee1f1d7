"""Weights in the Triton kernels against the references: run by the interpreter tier and by the gpu tier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harmonica_kernels.forecast.reference import forecast_reference
from harmonica_kernels.forecast.triton import forecast_triton
from harmonica_kernels.gated_residual.reference import gated_residual_reference
from harmonica_kernels.gated_residual.triton import gated_residual_triton
from harmonica_kernels.residual_reuse.reference import residual_reuse_reference
from harmonica_kernels.residual_reuse.triton import residual_reuse_triton
from harmonica_kernels.residual_reuse_norm_modulate.reference import residual_reuse_norm_modulate_reference
from harmonica_kernels.residual_reuse_norm_modulate.triton import residual_reuse_norm_modulate_triton
from tests.kernels.triton_comparisons import DEVICE, assert_same_bits, on_device
from tests.kernels.weighted_sums import COUNTS, Sum, cancelling, draw


def compare(given: Sum) -> None:
    gates = [None if gate is None else on_device(gate) for gate in given.gates]
    moved = given._replace(
        x=on_device(given.x),
        caches=[on_device(cache) for cache in given.caches],
        gates=gates,
        weights=on_device(given.weights),
    )
    expected = residual_reuse_reference(*given)
    assert_same_bits(residual_reuse_triton(*moved), expected)
    hidden, out = residual_reuse_norm_modulate_triton(*moved[:3], shift=moved.x, **moved.weighting)
    true = residual_reuse_norm_modulate_reference(*given[:3], shift=given.x, **given.weighting)
    assert_same_bits(hidden, expected)
    tolerance = 4 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.cpu(), true[1], rtol=tolerance, atol=tolerance * float(true[1].abs().max()))


@pytest.mark.parametrize(
    ("counts", "dtype"),
    [
        ("one", torch.float32),
        ("two", torch.bfloat16),
        ("pairs", torch.float16),
        ("mixed", torch.float32),
        ("mixed", torch.float64),
    ],
)
def test_sums(counts: str, dtype: torch.dtype) -> None:
    """Up to 23 caches: several launches, each of whole entries."""
    compare(draw((2, 3, 77), dtype, COUNTS[counts]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_cancelling(dtype: torch.dtype) -> None:
    compare(cancelling((4, 3, 64), dtype))


def test_more_caches_per_gate_than_a_launch_takes() -> None:
    compare(draw((2, 40), torch.float32, [9, 1]))


def test_strided_views() -> None:
    given = draw((2, 9, 30), torch.float16, [2, 1])
    for view in (lambda t: t[:, 3:, ::2], lambda t: t[..., :6].transpose(1, 2)):
        x = view(given.x)
        compare(given._replace(x=x, caches=[view(c) for c in given.caches], gates=[x[:, :1], None]))


def test_gated_residual() -> None:
    given = draw((2, 5, 77), torch.float16, [1])
    for gate in (None, given.gates[0]):
        arguments = [given.x, given.caches[0], gate, given.weights]
        found = gated_residual_triton(*(None if t is None else on_device(t) for t in arguments), [9])
        assert_same_bits(found, gated_residual_reference(*arguments, [9]))


FORECASTS = {
    "contiguous": lambda t: t,
    "heads": lambda t: t.transpose(1, 2),
    "cut": lambda t: t[..., 1:],
    "expanded": lambda t: t[:1].expand(3, -1, -1, -1),
    "no-rows": lambda t: t.reshape(2, 3, 5, 2, 8).transpose(0, 3)[:, :2, :4],
    "number": lambda t: t[0, 0, 0, 0],
}


@pytest.mark.parametrize("view", FORECASTS)
def test_forecast(view: str) -> None:
    """A forecast lies in memory as its caches do, whatever kernel computes it."""
    weights = torch.tensor([[0.0, 40.3, -39.3, 1.5]])
    caches = [FORECASTS[view](cache) for cache in torch.randn(3, 2, 3, 5, 16).half().unbind()]
    for places in ([1], [1, 2], [3, -1, 2]):
        given = caches[: len(places)]
        found = forecast_triton([on_device(cache) for cache in given], on_device(weights), places)
        expected = forecast_reference(given, weights, places)
        assert found.stride() == torch.empty_like(given[0]).stride() == expected.stride()
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 9])
def test_forecast_that_the_reference_is_left(count: int) -> None:
    caches: list[Tensor] = [torch.randn(2, 3, dtype=torch.float64).to(DEVICE) for _ in range(count)]
    weights = torch.ones(1, device=DEVICE)
    assert torch.equal(forecast_triton(caches, weights, [0] * count), forecast_reference(caches, weights, [0] * count))
