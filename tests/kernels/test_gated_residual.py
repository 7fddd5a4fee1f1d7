"""`gated_residual`: every implementation against the reference, the reference against fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harmonica_kernels import build_info, gated_residual
from harmonica_kernels._checks import DTYPES
from harmonica_kernels.gated_residual.reference import gated_residual_reference
from tests.tiers import member

REFERENCE_OP = torch.ops.harmonica._gated_residual_reference.default
IMPLEMENTATIONS = [
    pytest.param(gated_residual, id="op"),
    pytest.param(REFERENCE_OP, id="reference"),
]
HALF = (torch.bfloat16, torch.float16)
SHAPES = [
    pytest.param((2, 16, 64), id="small"),
    pytest.param((3, 37, 1152), id="odd-rows"),
    pytest.param((2, 5, 77), id="odd-width"),
    pytest.param((1, 300, 1536), id="threaded"),
    pytest.param((2, 0, 8), id="empty"),
    pytest.param((7,), id="vector"),
]


def chunked(x: Tensor) -> Tensor:
    """A gate [B, 1, D] as adaLN makes it: one chunk of six, so that batches are 6 D apart."""
    batch, _, width = x.shape
    return torch.randn(batch, 6 * width).to(x.dtype).chunk(6, dim=1)[2].unsqueeze(1)


GATES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda x: None,
    "width": lambda x: torch.randn(x.shape[-1:]).to(x.dtype),
    "full": lambda x: torch.randn(x.shape).to(x.dtype),
    "transposed": lambda x: torch.randn(x.shape[::-1]).to(x.dtype).permute(*range(x.ndim)[::-1]),
    "number": lambda x: torch.randn(()).to(x.dtype),
    "row-number": lambda x: torch.randn(*x.shape[:-1], 1).to(x.dtype),
    "batch": lambda x: chunked(x) if x.ndim == 3 else torch.randn(x.shape).to(x.dtype),
}


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values, signs of zero included; any NaN equals any NaN."""
    nan = a.isnan() & b.isnan()
    return bool((((a == b) & (a.signbit() == b.signbit())) | nan).all())


def test_extension_is_built() -> None:
    info = build_info()
    if info.chosen:
        pytest.skip("built with HARMONICA_BUILD_CSRC=0")
    assert info.extension, info.reason


# `make test` runs each shape with two kinds of gate, and one shape with all of them
SHAPES_AND_GATES = [
    member(*shape.values, gate, id=f"{shape.id}-{gate}", always=shape.id == "odd-width" or gate in ("none", "batch"))
    for shape, gate in itertools.product(SHAPES, GATES)
]


@pytest.mark.parametrize(("shape", "gate"), SHAPES_AND_GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_equals_reference(dtype: torch.dtype, shape: tuple[int, ...], gate: str) -> None:
    x, y = draw(shape, dtype)
    g = GATES[gate](x)
    out = gated_residual(x, y, g)
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert same_bits(out, gated_residual_reference(x, y, g))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gate", ["none", "batch"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_error_at_most_twice_that_of_eager(
    dtype: torch.dtype, gate: str, implementation: Callable[..., Tensor]
) -> None:
    x, y = draw((3, 37, 1152), dtype)
    g = GATES[gate](x)
    exact = x.double() + (y.double() if g is None else g.double() * y.double())
    eager = x + (y if g is None else g * y)
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    allowed = torch.maximum(2 * (eager.double() - exact).abs().max(), ulp)
    assert (implementation(x, y, g).double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_bit_pattern(dtype: torch.dtype) -> None:
    """Subnormals, infinities, NaN, ties and overflow are converted as PyTorch converts them."""
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    x, y, gate = every, every[torch.randperm(1 << 16)], every[torch.randperm(1 << 16)]
    assert same_bits(gated_residual(x, torch.zeros_like(x)), gated_residual_reference(x, torch.zeros_like(x)))
    assert same_bits(gated_residual(x, y, gate), gated_residual_reference(x, y, gate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[:, 3:], id="rows-cut-off"),
        pytest.param(lambda t: t.transpose(1, 2), id="transposed"),
        pytest.param(lambda t: t[..., ::2], id="every-second"),
        pytest.param(lambda t: t[:1].expand(4, -1, -1), id="expanded"),
    ],
)
def test_strided_views(dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    x, y = (view(t) for t in draw((2, 9, 30), dtype))
    gate = torch.randn(x.shape[0], 1, x.shape[2]).to(dtype)
    out = gated_residual(x, y, gate)
    assert out.is_contiguous()
    assert same_bits(out, gated_residual_reference(x, y, gate))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_arguments_stay_as_they_are_and_nothing_aliases(implementation: Callable[..., Tensor]) -> None:
    x, y = draw((2, 3, 4), torch.float32)
    before = x.clone(), y.clone()
    for gate in (None, torch.ones(4), torch.zeros(2, 1, 4)):
        out = implementation(x, y, gate)
        assert out.data_ptr() not in (x.data_ptr(), y.data_ptr())
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert torch.equal(implementation(x, x), 2 * x)


X = torch.zeros(2, 5, 6)
BAD = [
    pytest.param((X, X[0], None), ValueError, r"y has shape \[5, 6\], expected that of x, \[2, 5, 6\]", id="y-shape"),
    pytest.param((X, X, X[:1, :1, :4]), ValueError, r"gate has shape \[1, 1, 4\]", id="gate-width"),
    pytest.param((X, X, X[None]), ValueError, r"gate has shape \[1, 2, 5, 6\]", id="gate-rank"),
    pytest.param((X[:1], X[:1], X), ValueError, r"gate has shape \[2, 5, 6\]", id="gate-larger-than-x"),
    pytest.param((X, X.double(), None), TypeError, "y has dtype torch.float64", id="y-dtype"),
    pytest.param((X.half(), X.half(), X), TypeError, "gate has dtype torch.float32", id="gate-dtype"),
    pytest.param((X.long(), X.long(), None), TypeError, "x has dtype torch.int64", id="integers"),
    pytest.param((X, X.to("meta"), None), ValueError, "y is on meta, x is on cpu", id="y-device"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD)
def test_errors_are_the_same_everywhere(
    arguments: tuple[Tensor, Tensor, Tensor | None], kind: type[Exception], message: str
) -> None:
    said = set()
    for implementation in (gated_residual, gated_residual_reference, REFERENCE_OP):
        with pytest.raises(kind, match=message) as caught:
            implementation(*arguments)
        said.add(str(caught.value))
    if all(t is None or t.device.type == "cpu" for t in arguments):
        meta = [t if t is None else t.to("meta") for t in arguments]
        with pytest.raises(kind, match=message) as caught:
            torch.ops.harmonica.gated_residual.default(*meta)
        said.add(str(caught.value))
    assert len(said) == 1


@pytest.mark.parametrize("gate", ["none", "batch", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schema_fake_and_tracing_agree(dtype: torch.dtype, gate: str) -> None:
    x, y = draw((2, 3, 8), dtype)
    torch.library.opcheck(torch.ops.harmonica.gated_residual.default, (x, y, GATES[gate](x)))


class Block(torch.nn.Module):
    """Two ops with something between them, as a graph would have."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return gated_residual(gated_residual(x, y, gate) * 2, y)


def test_export_and_compile() -> None:
    x, y = draw((2, 3, 8), torch.float32)
    arguments = (x, y, chunked(x))
    expected = Block()(*arguments)

    exported = torch.export.export(Block(), arguments, strict=False)
    called = [node.target for node in exported.graph.nodes]
    assert called.count(torch.ops.harmonica.gated_residual.default) == 2
    assert torch.equal(exported.module()(*arguments), expected)

    compiled = torch.compile(Block(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), expected)


def test_backward_is_not_silent() -> None:
    x, y = draw((2, 3), torch.float32)
    out = gated_residual(x, y.requires_grad_())
    with pytest.warns(UserWarning, match="harmonica::gated_residual: an autograd kernel was not registered"):
        out.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_equals_cpu_reference(dtype: torch.dtype) -> None:
    x, y = draw((3, 37, 1152), dtype)
    gate = chunked(x)
    out = gated_residual(x.cuda(), y.cuda(), gate.cuda()).cpu()
    expected = gated_residual_reference(x, y, gate)
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
