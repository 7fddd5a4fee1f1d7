"""`forecast`: every implementation for the CPU against the weighted sum of plain step graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harmonica_kernels import forecast
from harmonica_kernels._checks import DTYPES
from harmonica_kernels.forecast.reference import forecast_reference
from harmonica_rt.graph.weighted_sum import weighted_sum
from tests.kernels.test_residual_reuse import same_bits
from tests.kernels.weighted_sums import draw

OPS = torch.ops.harmonica
X, W = torch.zeros(2, 5, 6), torch.zeros(2, 4)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forecast_is_the_weighted_sum_of_plain_step_graphs(dtype: torch.dtype, count: int) -> None:
    weights = torch.randn(3, 5)
    for shape in ((2, 23, 1152), (2, 5, 77), (3,), ()):
        caches = list(torch.randn(count, *shape).to(dtype).unbind())
        found = forecast(caches, weights, list(range(5, 5 + count)))
        assert same_bits(found, weighted_sum(caches, weights, 1))
        assert same_bits(found, forecast_reference(caches, weights, list(range(5, 5 + count))))


@pytest.mark.parametrize("run", [forecast, OPS._forecast_reference.default], ids=["op", "reference"])
def test_a_forecast_lies_in_memory_as_its_caches(run: Callable[..., Tensor]) -> None:
    heads = list(torch.randn(2, 2, 3, 5, 8).transpose(2, 3))
    found = run(heads, torch.tensor([2.0, -1.0]), [0, 1])
    assert found.stride() == heads[0].stride()
    torch.testing.assert_close(found, 2 * heads[0] - heads[1])
    on_meta = [head.to("meta") for head in heads]
    assert OPS.forecast(on_meta, torch.empty(2, device="meta"), [0, 1]).stride() == found.stride()
    assert run([torch.empty(2, 0)], torch.ones(1), [0]).shape == (2, 0)


@pytest.mark.parametrize(
    ("caches", "weights", "places", "kind", "message"),
    [
        pytest.param([], W, [], ValueError, "caches is empty", id="empty"),
        pytest.param(
            [X, X[0]], W, [0, 1], ValueError, r"caches\[1\] has shape \[5, 6\], expected that of ca", id="shape"
        ),
        pytest.param([X, X.half()], W, [0, 1], TypeError, r"caches\[1\] has dtype torch.float16", id="dtype"),
        pytest.param([X.int()], W, [0], TypeError, r"caches\[0\] has dtype torch.int32", id="integers"),
        pytest.param([X], W.double(), [0], TypeError, "weights has dtype torch.float64", id="weights"),
        pytest.param([X], W, [0, 1], ValueError, "got 2 places for 1 caches", id="places"),
    ],
)
def test_errors_of_forecast(
    caches: list[Tensor], weights: Tensor, places: list[int], kind: type[Exception], message: str
) -> None:
    for run in (forecast, forecast_reference, OPS._forecast_reference):
        with pytest.raises(kind, match=f"forecast: {message}"):
            run(caches, weights, places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schema_fake_and_tracing_agree(dtype: torch.dtype) -> None:
    given = draw((2, 3, 8), dtype, [2, 1])
    torch.library.opcheck(OPS.forecast.default, (given.caches, given.weights, given.places))
    with pytest.warns(UserWarning, match="harmonica::forecast: an autograd kernel was not registered"):
        forecast([given.x.requires_grad_()], given.weights, [0]).sum().backward()
