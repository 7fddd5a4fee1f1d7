"""Weights in the residual operators: every implementation for the CPU against independent sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harmonica_kernels import forecast, gated_residual, residual_reuse, residual_reuse_norm_modulate
from harmonica_kernels._checks import DTYPES
from harmonica_kernels.gated_residual.reference import gated_residual_reference
from harmonica_kernels.residual_reuse.reference import residual_reuse_reference
from harmonica_kernels.residual_reuse_norm_modulate.reference import residual_reuse_norm_modulate_reference
from tests.kernels.test_residual_reuse import same_bits
from tests.kernels.weighted_sums import COUNTS, Sum, cancelling, draw
from tests.tiers import member

OPS = torch.ops.harmonica
HALF = (torch.bfloat16, torch.float16)
SHAPES = {"odd": (2, 5, 77), "threaded": (2, 23, 1152), "wide": (1, 2, 3201), "vector": (7,), "empty": (2, 0, 8)}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows-cut-off": lambda t: t[:, 3:],
    "transposed": lambda t: t.transpose(1, 2),
    "every-second": lambda t: t[..., ::2],
    "expanded": lambda t: t[:1].expand(4, -1, -1),
    "one-number-a-row": lambda t: t[..., :1].expand(-1, -1, 5),
}


def norms(run: Callable[..., Any], given: Sum) -> tuple[Tensor, Tensor]:
    hidden, out = run(given.x, given.caches, given.gates, scale=given.x, eps=1e-3, **given.weighting)
    return hidden, out


def check_all(given: Sum) -> None:
    """`residual_reuse` and hidden of `residual_reuse_norm_modulate` have the bits of the reference, out is close."""
    expected = residual_reuse_reference(*given)
    found = residual_reuse(*given)
    assert (found.shape, found.dtype) == (given.x.shape, given.x.dtype)
    assert found.is_contiguous()
    assert same_bits(found, expected)
    hidden, out = norms(residual_reuse_norm_modulate, given)
    true_hidden, true_out = norms(residual_reuse_norm_modulate_reference, given)
    assert same_bits(hidden, expected)
    assert same_bits(true_hidden, expected)
    torch.testing.assert_close(out, true_out)


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        member(shape, counts, id=f"{shape}-{counts}", always=shape == "odd" or counts in ("pairs", "mixed"))
        for shape in SHAPES
        for counts in COUNTS
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ops_equal_the_reference(dtype: torch.dtype, shape: str, counts: str) -> None:
    check_all(draw(SHAPES[shape], dtype, COUNTS[counts]))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views(dtype: torch.dtype, view: str) -> None:
    given = draw((2, 9, 30), dtype, COUNTS["mixed"])
    x, caches = VIEWS[view](given.x), [VIEWS[view](cache) for cache in given.caches]
    given = given._replace(x=x, caches=caches, gates=[None, x[:1, :1], x, *[None] * 6, x[..., :1]])
    assert same_bits(residual_reuse(*given), residual_reuse_reference(*given))
    dense = given._replace(x=x.contiguous(), caches=[cache.contiguous() for cache in caches])
    for found, expected in zip(*(norms(residual_reuse_norm_modulate, each) for each in (given, dense)), strict=True):
        assert same_bits(found, expected)
    assert same_bits(forecast(caches[:4], given.weights, [0, 5, -1, 7]), expected_forecast(caches[:4], given.weights))


def expected_forecast(caches: list[Tensor], weights: Tensor) -> Tensor:
    """The forecast with places 0, 5, -1 and 7, op by op."""
    wide = torch.promote_types(caches[0].dtype, torch.float32)
    first, second, third, fourth = (cache.to(wide) for cache in caches)
    flat = weights.flatten()
    return (first * flat[0] + second * flat[5] + third + fourth * flat[7]).to(caches[0].dtype)


@pytest.mark.parametrize("counts", ["two", "four", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_sum_on_paper(dtype: torch.dtype, counts: str) -> None:
    """Errors against fp64: at most twice those of eager PyTorch with a sum of its own per gate, or one ulp."""
    given = draw((2, 7, 1152), dtype, COUNTS[counts])
    exact, ulp = given.exact(), torch.finfo(dtype).eps
    error = (residual_reuse_reference(*given).double() - exact).abs()
    if dtype == torch.float64:
        assert error.max() <= 1e-13 * exact.abs().max()
        return
    allowed = (given.exact(torch.float32).to(dtype).double() - exact).abs()
    assert error.max() <= torch.maximum(2 * allowed.max(), ulp * exact.abs().max())
    assert error.square().mean() <= torch.maximum(4 * allowed.square().mean(), (ulp * exact.abs().max()) ** 2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("op", ["residual_reuse", "norm", "forecast"])
def test_weights_are_not_rounded_to_half(op: str, dtype: torch.dtype) -> None:
    """Each result is the exact one, rounded once; with rounded weights hardly any would be."""
    given = cancelling((4, 33, 64), dtype)
    run: dict[str, Callable[[Sum], Tensor]] = {
        "residual_reuse": lambda given: residual_reuse(*given),
        "norm": lambda given: norms(residual_reuse_norm_modulate, given)[0],
        "forecast": lambda given: forecast(given.caches, given.weights, given.places),
    }
    exact = given.exact().to(dtype)
    rounded = given._replace(weights=given.weights.to(dtype).float())
    assert (run[op](given) == exact).float().mean() > 0.99
    assert (run[op](rounded) == exact).float().mean() < 0.2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_residual(dtype: torch.dtype) -> None:
    given = draw((2, 5, 77), dtype, [1, 1, 1])
    for cache, gate in zip(given.caches, given.gates, strict=True):
        for place in (-1, 0, 9):
            found = gated_residual(given.x, cache, gate, given.weights, [place])
            assert same_bits(found, gated_residual_reference(given.x, cache, gate, given.weights, [place]))
            assert same_bits(found, residual_reuse(given.x, [cache], [gate], given.weights, [place]))
            assert same_bits(found, gated_residual(given.x, cache, gate)) is (place == -1)


def test_counts_without_weights_are_sums() -> None:
    given = draw((2, 5, 77), torch.float32, [2, 1, 3])
    ones = torch.ones(1), [0] * 6
    plain = residual_reuse(given.x, given.caches, given.gates, counts=given.counts)
    assert same_bits(plain, residual_reuse(given.x, given.caches, given.gates, *ones, given.counts))
    assert same_bits(plain, residual_reuse_reference(given.x, given.caches, given.gates, counts=given.counts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_one_are_no_weights(dtype: torch.dtype) -> None:
    given = draw((2, 5, 77), dtype, [1] * 9)
    plain = residual_reuse(given.x, given.caches, given.gates)
    assert same_bits(plain, residual_reuse(*given[:3], torch.ones(9), list(range(9))))
    assert same_bits(plain, residual_reuse(*given[:3], torch.empty(0), [-1] * 9))


def test_weights_are_read_when_the_op_runs() -> None:
    given = draw((2, 5, 77), torch.float32, [2])
    given.weights.zero_()
    assert torch.equal(residual_reuse(*given), given.x)
    given.weights.fill_(1)
    assert torch.equal(residual_reuse(*given), given.exact(torch.float32))


def test_weights_of_any_layout() -> None:
    given = draw((2, 5, 77), torch.float32, [2, 2])
    expected, caches = residual_reuse(*given), given.caches[:2]
    column = torch.stack([given.weights, given.weights], dim=-1)[..., 0].mT.contiguous().mT
    negated = torch._neg_view(-given.weights)
    for weights in (column, negated, given.weights.flatten()):
        assert same_bits(residual_reuse(*given._replace(weights=weights)), expected)
        assert same_bits(forecast(caches, weights, [3, 4]), forecast(caches, given.weights, [3, 4]))


X, W = torch.zeros(2, 5, 6), torch.zeros(2, 4)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no-weights": ({"weights": None}, ValueError, "got 2 places without weights"),
    "half-weights": ({"weights": W.half()}, TypeError, "weights has dtype torch.float16, expected torch.float32"),
    "device": ({"weights": W.to("meta")}, ValueError, "weights is on meta, x is on cpu"),
    "too-few-places": ({"places": [0]}, ValueError, "got 1 places for 2 caches"),
    "beyond": ({"places": [0, 8]}, ValueError, r"places\[1\] is 8, expected -1 or the index of one of 8 weights"),
    "negative": ({"places": [-2, 0]}, ValueError, r"places\[0\] is -2"),
    "counts": ({"counts": [1]}, ValueError, r"counts is \[1\] for 1 gates and 2 caches; give each gate the number of"),
    "gates": ({"counts": [1, 1]}, ValueError, r"counts is \[1, 1\] for 1 gates"),
    "count-of-none": ({"counts": [2, 0], "gates": [None, None]}, ValueError, r"counts is \[2, 0\]"),
    "no-counts": ({"counts": []}, ValueError, "got 1 gates for 2 caches"),
}


@pytest.mark.parametrize("op", ["residual_reuse", "residual_reuse_norm_modulate"])
@pytest.mark.parametrize("case", BAD)
def test_errors_are_the_same_everywhere(case: str, op: str) -> None:
    changed, kind, message = BAD[case]
    arguments = {"gates": [None], "weights": W, "places": [0, 1], "counts": [2], **changed}
    said = set()
    for name in (op, f"_{op}_reference"):
        with pytest.raises(kind, match=f"{op}: {message}") as caught:
            getattr(OPS, name)(X, [X, X], **arguments)
        said.add(str(caught.value))
    if case != "device":
        moved = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in arguments.items()}
        with pytest.raises(kind, match=message) as caught:
            getattr(OPS, op)(X.to("meta"), [X.to("meta")] * 2, **moved)
        said.add(str(caught.value))
    assert len(said) == 1


def test_a_weight_of_gated_residual_has_one_place() -> None:
    for run in (gated_residual, gated_residual_reference):
        with pytest.raises(ValueError, match="gated_residual: got 2 places for 1 caches"):
            run(X, X, None, W, [0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schema_fake_and_tracing_agree(dtype: torch.dtype) -> None:
    given = draw((2, 3, 8), dtype, [2, 1])
    torch.library.opcheck(OPS.residual_reuse.default, given)
    torch.library.opcheck(OPS.residual_reuse_norm_modulate.default, given[:3], given.weighting)
    torch.library.opcheck(OPS.gated_residual.default, (given.x, given.x, None, given.weights, [2]))
