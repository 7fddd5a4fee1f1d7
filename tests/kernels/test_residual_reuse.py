"""`residual_reuse`: every implementation against the reference, the reference against fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from harmonica_kernels import gated_residual, residual_reuse
from harmonica_kernels._checks import DTYPES
from harmonica_kernels.residual_reuse.reference import residual_reuse_reference
from tests.tiers import member

OP = torch.ops.harmonica.residual_reuse.default
REFERENCE_OP = torch.ops.harmonica._residual_reuse_reference.default
IMPLEMENTATIONS = [pytest.param(residual_reuse, id="op"), pytest.param(REFERENCE_OP, id="reference")]
SHAPES = [
    pytest.param((2, 16, 64), id="small"),
    pytest.param((2, 5, 77), id="odd-width"),
    pytest.param((2, 23, 1152), id="threaded"),
    pytest.param((1, 3, 3200), id="wider-than-a-block"),
    pytest.param((2, 9, 1), id="one-column"),
    pytest.param((2, 0, 8), id="empty"),
    pytest.param((7,), id="vector"),
    pytest.param((), id="number"),
]
Shape = tuple[int, ...]


def chunked(shape: Shape) -> Tensor:
    """A gate [B, 1, D] as adaLN makes it: one chunk of six, so that batches are 6 D apart."""
    if len(shape) != 3:
        return torch.randn(shape)
    batch, _, width = shape
    return torch.randn(batch, 6 * width).chunk(6, dim=1)[2].unsqueeze(1)


GATES: dict[str, Callable[[Shape], Tensor | None]] = {
    "batch": chunked,
    "none": lambda shape: None,
    "full": torch.randn,
    "number": lambda shape: torch.randn(()),
    "width": lambda shape: torch.randn(shape[-1:]),
    "transposed": lambda shape: torch.randn(shape[::-1]).permute(list(range(len(shape)))[::-1]),
    "row-number": lambda shape: torch.randn(shape[:-1] + (1,) * len(shape[-1:])),
}


def draw(shape: Shape, dtype: torch.dtype, kinds: Sequence[str]) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """X, caches, and gates of these kinds."""
    x, *caches = torch.randn(len(kinds) + 1, *shape).to(dtype).unbind()
    gates = [GATES[kind](shape) for kind in kinds]
    return x, caches, [gate if gate is None else gate.to(dtype) for gate in gates]


def in_turn(count: int) -> list[str]:
    """Kinds of `count` gates, all of them in turn."""
    kinds = list(GATES)
    return [kinds[k % len(kinds)] for k in range(count)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values, signs of zero included; any NaN equals any NaN."""
    nan = a.isnan() & b.isnan()
    return bool((((a == b) & (a.signbit() == b.signbit())) | nan).all())


def equals_reference(x: Tensor, caches: list[Tensor], gates: list[Tensor | None]) -> bool:
    out, expected = residual_reuse(x, caches, gates), residual_reuse_reference(x, caches, gates)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    assert expected.is_contiguous()
    return same_bits(out, expected)


# `make test` runs each shape with two numbers of caches, and one shape with all of them
SHAPES_AND_COUNTS = [
    member(*shape.values, count, id=f"{shape.id}-{count}", always=shape.id == "odd-width" or count in (3, 9))
    for shape, count in itertools.product(SHAPES, [1, 2, 3, 4, 5, 8, 9, 17])
]


@pytest.mark.parametrize(("shape", "count"), SHAPES_AND_COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_equals_reference(dtype: torch.dtype, shape: Shape, count: int) -> None:
    assert equals_reference(*draw(shape, dtype, in_turn(count)))


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_gate_alone(dtype: torch.dtype, kind: str) -> None:
    assert equals_reference(*draw((2, 5, 77), dtype, [kind]))
    assert equals_reference(*draw((2, 5, 77), dtype, [kind] * 6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[:, 3:], id="rows-cut-off"),
        pytest.param(lambda t: t.transpose(1, 2), id="transposed"),
        pytest.param(lambda t: t[..., ::2], id="every-second"),
        pytest.param(lambda t: t[:1].expand(4, -1, -1), id="expanded"),
        pytest.param(lambda t: t[..., :1].expand(-1, -1, 5), id="one-number-a-row"),
    ],
)
def test_strided_views(dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    x, caches, _ = draw((2, 9, 30), dtype, in_turn(6))
    x, caches = view(x), [view(cache) for cache in caches]
    assert equals_reference(x, caches, [None, *caches[:3], x[:, :1], x[0, 0]])


def test_some_views_among_dense_tensors() -> None:
    x, caches, gates = draw((2, 9, 30), torch.bfloat16, in_turn(6))
    caches[1], caches[4] = caches[1].mT.contiguous().mT, x
    assert equals_reference(x, caches, gates)


def test_terms_are_added_in_order() -> None:
    big, small = torch.full((2, 4), 1e8), torch.ones(2, 4)
    assert residual_reuse(small, [big, -big, small], [None] * 3).eq(1).all()
    assert residual_reuse(small, [small, big, -big], [None] * 3).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_one_term_is_gated_residual(dtype: torch.dtype) -> None:
    x, caches, gates = draw((2, 5, 77), dtype, ["batch"])
    assert same_bits(residual_reuse(x, caches, gates), gated_residual(x, caches[0], gates[0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [1, 6, 17])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_error_at_most_twice_that_of_eager(
    dtype: torch.dtype, count: int, implementation: Callable[..., Tensor]
) -> None:
    x, caches, gates = draw((2, 7, 1152), dtype, in_turn(count))
    exact, eager = x.double(), x
    for cache, gate in zip(caches, gates, strict=True):
        exact = exact + (cache.double() if gate is None else gate.double() * cache.double())
        eager = eager + (cache if gate is None else gate * cache)
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    error, allowed = implementation(x, caches, gates).double() - exact, eager.double() - exact
    assert error.abs().max() <= torch.maximum(2 * allowed.abs().max(), ulp)
    assert error.square().mean().sqrt() <= torch.maximum(2 * allowed.square().mean().sqrt(), ulp)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_arguments_stay_as_they_are_and_nothing_aliases(implementation: Callable[..., Tensor]) -> None:
    x, caches, _ = draw((2, 3, 4), torch.float32, in_turn(2))
    before = [t.clone() for t in (x, *caches)]
    for gate in (None, torch.ones(4), torch.zeros(2, 1, 4)):
        out = implementation(x, caches, [gate, gate])
        assert out.data_ptr() not in [t.data_ptr() for t in (x, *caches)]
    assert all(torch.equal(a, b) for a, b in zip((x, *caches), before, strict=True))
    assert torch.equal(implementation(x, [x, x], [None, None]), x + x + x)


X = torch.zeros(2, 5, 6)
BAD = [
    pytest.param((X, [], []), ValueError, "caches is empty, expected at least one", id="no-caches"),
    pytest.param((X, [X, X], [None]), ValueError, "got 1 gates for 2 caches", id="too-few-gates"),
    pytest.param((X, [X], []), ValueError, "got 0 gates for 1 caches", id="no-gates"),
    pytest.param((X, [X, X[0]], [None] * 2), ValueError, r"caches\[1\] has shape \[5, 6\], expected", id="cache-shape"),
    pytest.param((X, [X, X], [None, X[..., :4]]), ValueError, r"gates\[1\] has shape \[2, 5, 4\]", id="gate-width"),
    pytest.param((X, [X], [X[None]]), ValueError, r"gates\[0\] has shape \[1, 2, 5, 6\]", id="gate-rank"),
    pytest.param((X, [X.double()], [None]), TypeError, r"caches\[0\] has dtype torch.float64", id="cache-dtype"),
    pytest.param((X.half(), [X.half()], [X]), TypeError, r"gates\[0\] has dtype torch.float32", id="gate-dtype"),
    pytest.param((X.long(), [X.long()], [None]), TypeError, "x has dtype torch.int64", id="integers"),
    pytest.param((X, [X.to("meta")], [None]), ValueError, r"caches\[0\] is on meta, x is on cpu", id="cache-device"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD)
def test_errors_are_the_same_everywhere(
    arguments: tuple[Tensor, list[Tensor], list[Tensor | None]], kind: type[Exception], message: str
) -> None:
    said = set()
    for implementation in (residual_reuse, residual_reuse_reference, REFERENCE_OP):
        with pytest.raises(kind, match=message) as caught:
            implementation(*arguments)
        said.add(str(caught.value))
    x, caches, gates = arguments
    if all(t is None or t.device.type == "cpu" for t in (*caches, *gates)):
        on_meta = [t if t is None else t.to("meta") for t in gates]
        with pytest.raises(kind, match=message) as caught:
            OP(x.to("meta"), [t.to("meta") for t in caches], on_meta)
        said.add(str(caught.value))
    assert len(said) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", [["none"], ["batch", "none", "full"]], ids=len)
def test_schema_fake_and_tracing_agree(dtype: torch.dtype, kinds: list[str]) -> None:
    torch.library.opcheck(OP, draw((2, 3, 8), dtype, kinds))


class Block(torch.nn.Module):
    """Two ops with something between them, as a graph would have."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return residual_reuse(residual_reuse(x, [y], [gate]) * 2, [y, x], [None, gate])


def test_export_and_compile() -> None:
    x, caches, gates = draw((2, 3, 8), torch.float32, ["batch"])
    arguments = (x, caches[0], gates[0])
    expected = Block()(*arguments)

    exported = torch.export.export(Block(), arguments, strict=False)
    assert [node.target for node in exported.graph.nodes].count(OP) == 2
    assert torch.equal(exported.module()(*arguments), expected)

    compiled = torch.compile(Block(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), expected)


def test_backward_is_not_silent() -> None:
    x, caches, _ = draw((2, 3), torch.float32, ["none"])
    out = residual_reuse(x.requires_grad_(), caches, [None])
    with pytest.warns(UserWarning, match="harmonica::residual_reuse: an autograd kernel was not registered"):
        out.sum().backward()
