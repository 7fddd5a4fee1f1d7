"""`norm_rotary`: the reference against PyTorch's norms and diffusers' rotation, every implementation in tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

from harmonica_kernels import norm_rotary
from harmonica_kernels._checks import DTYPES
from harmonica_kernels.norm_rotary.reference import norm_rotary_reference
from tests.kernels.test_lazy_tensors import KINDS
from tests.tiers import member

OP = torch.ops.harmonica.norm_rotary.default
REFERENCE_OP = torch.ops.harmonica._norm_rotary_reference.default
IMPLEMENTATIONS = [pytest.param(norm_rotary, id="op"), pytest.param(REFERENCE_OP, id="reference")]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call."""

    parts: list[Tensor]
    counts: list[int]
    weights: list[Tensor | None]
    biases: list[Tensor | None]
    cos: list[Tensor | None]
    sin: list[Tensor | None]
    settings: dict[str, Any]

    def call(self, run: Callable[..., Any]) -> list[Tensor]:
        return list(run(*self.tensors, **self.settings))

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self.parts, self.counts, self.weights, self.biases, self.cos, self.sin

    def map(self, function: Callable[[Tensor], Tensor], *names: str) -> Arguments:
        """The same with the tensors of these fields, by default of all, changed."""
        names = names or ("parts", "weights", "biases", "cos", "sin")
        given = {name: [None if t is None else function(t) for t in getattr(self, name)] for name in names}
        return replace(self, **given)

    def cast(self, dtype: torch.dtype) -> Arguments:
        """Parts and vectors in `dtype`, tables in the dtype of its arithmetic."""
        wide = torch.float32 if dtype in HALF else dtype
        return self.map(lambda t: t.to(dtype), "parts", "weights", "biases").map(lambda t: t.to(wide), "cos", "sin")


# [B, N, H, D] of the queries of text and image as most models lay them out, and other shapes, with the joined dimension
SHAPES = {
    "joint": ((2, 5, 4, 16), 1),
    "odd-heads": ((2, 3, 3, 24), 1),
    "threaded": ((1, 40, 16, 64), 1),
    "heads-first": ((2, 4, 6, 20), 2),
    "no-heads": ((2, 5, 130), 1),
    "tokens": ((7, 8), 0),
}
KINDS_OF_CALL: dict[str, dict[str, Any]] = {
    "rms-pairs": {"norm": "rms", "across": False, "interleaved": True},
    "rms-halves": {"norm": "rms", "across": False, "interleaved": False},
    "rms-across": {"norm": "rms", "across": True, "interleaved": True},
    "layer-pairs": {"norm": "layer", "across": False, "interleaved": True},
    "layer-across": {"norm": "layer", "across": True, "interleaved": False},
    "pairs": {"norm": "none", "across": False, "interleaved": True},
    "halves": {"norm": "none", "across": False, "interleaved": False},
}


def draw(name: str, dtype: torch.dtype, per_pair: bool = False, **settings: Any) -> Arguments:
    """Queries and keys, each of two parts of which the first of the keys is not rotated, the second not weighted."""
    shape, dim = SHAPES[name]
    across = settings["across"] = settings["across"] and dim < len(shape) - 2  # else the joined dimension is normed
    other = list(shape)
    other[dim] += 2
    parts = [torch.randn(size) for size in (shape, other, shape, other)]
    width = shape[-1] * (shape[-2] if across else 1)
    weights, biases = torch.randn(2, 3, width)
    tables = []
    for size in (shape[dim], shape[dim] + 2):
        broadcast = [size if axis == dim else 1 for axis in range(len(shape))]
        angles = torch.randn(*broadcast[:-1], shape[-1] // 2 if per_pair else shape[-1])
        tables.append((angles.cos(), angles.sin()))
    (cos, sin), (other_cos, other_sin) = tables
    return Arguments(
        parts,
        [2, 2],
        [weights[0], weights[1], weights[2], None],
        [None, biases[0], biases[1], None] if settings["norm"] == "layer" else [None] * 4,
        [cos, other_cos, None, other_cos],
        [sin, other_sin, None, other_sin],
        {"dim": dim, "eps": 1e-6, **settings},
    ).cast(dtype)


def eager(arguments: Arguments) -> list[Tensor]:
    """PyTorch's norms in the dtype of the parts, and the rotation in that of its tables."""
    settings, results, index = arguments.settings, [], 0
    for count in arguments.counts:
        joined = []
        for x in arguments.parts[index : index + count]:
            weight, bias = arguments.weights[index], arguments.biases[index]
            cos, sin = arguments.cos[index], arguments.sin[index]
            shape = x.shape[-2:] if settings["across"] else x.shape[-1:]
            flat = x.flatten(-2) if settings["across"] else x
            if settings["norm"] == "rms":
                flat = functional.rms_norm(flat, (shape.numel(),), eps=settings["eps"])
            elif settings["norm"] == "layer":
                flat = functional.layer_norm(flat, (shape.numel(),), eps=settings["eps"])
            flat = flat if weight is None else flat * weight
            out = (flat if bias is None else flat + bias).view(x.shape)
            joined.append(out if cos is None else rotated(out, cos, sin, settings["interleaved"]))
            index += 1
        results.append(torch.cat(joined, dim=settings["dim"]))
    return results


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = torch.stack([-b, a], dim=-1).flatten(-2) if interleaved else torch.cat([-b, a], dim=-1)
    if cos.shape[-1] == half:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin))
    wide = torch.promote_types(x.dtype, cos.dtype)
    return (x.to(wide) * cos + turned.to(wide) * sin).to(x.dtype)


def assert_in_tolerance(arguments: Arguments, found: list[Tensor]) -> None:
    """Errors against fp64, largest and RMS: at most twice those of eager PyTorch, or one ulp of the largest value.

    fp64 itself has nothing finer to be held against: it has to be close.
    """
    exact = arguments.map(Tensor.double).call(norm_rotary_reference)
    for ours, theirs, true in zip(found, eager(arguments), exact, strict=True):
        assert ours.dtype == arguments.parts[0].dtype
        assert ours.shape == true.shape
        assert ours.is_contiguous()
        if ours.dtype == torch.float64:
            torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)
            continue
        ulp = torch.finfo(ours.dtype).eps * true.abs().max()
        error, allowed = ours.double() - true, theirs.double() - true
        assert error.abs().max() <= torch.maximum(2 * allowed.abs().max(), ulp)
        assert error.square().mean().sqrt() <= torch.maximum(2 * allowed.square().mean().sqrt(), ulp)


@pytest.mark.parametrize("settings", KINDS_OF_CALL)
def test_reference_is_pytorch_op_by_op(settings: str) -> None:
    arguments = draw("joint", torch.float64, **KINDS_OF_CALL[settings])
    torch.testing.assert_close(arguments.call(norm_rotary_reference), eager(arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("unbind_dim", "interleaved"), [(-1, True), (-2, False)])
def test_reference_rotates_as_diffusers_does(unbind_dim: int, interleaved: bool) -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 8)
    expected = apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=unbind_dim, sequence_dim=1)
    tables = [cos[:, None]], [sin[:, None]]
    (found,) = norm_rotary_reference([x], [1], [None], [None], *tables, norm="none", interleaved=interleaved)
    assert torch.equal(found, expected)


def test_reference_rotates_as_a_complex_product() -> None:
    x, table = torch.randn(2, 5, 3, 8), torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    expected = apply_rotary_emb(x, table[None], use_real=False)
    cos, sin = torch.view_as_real(table)[:, None].unbind(-1)
    (found,) = norm_rotary_reference([x], [1], [None], [None], [cos], [sin], norm="none")
    torch.testing.assert_close(found, expected)


SWEEP = [
    member(shape, name, id=f"{shape}-{name}", always=shape == "odd-heads" or name in ("rms-pairs", "layer-across"))
    for shape in SHAPES
    for name in KINDS_OF_CALL
]


@pytest.mark.parametrize(("shape", "settings"), SWEEP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_tolerance(dtype: torch.dtype, shape: str, settings: str) -> None:
    for per_pair in (False, True):
        arguments = draw(shape, dtype, per_pair, **KINDS_OF_CALL[settings])
        for implementation in (norm_rotary, REFERENCE_OP):
            assert_in_tolerance(arguments, arguments.call(implementation))


@pytest.mark.parametrize("settings", [KINDS_OF_CALL["rms-pairs"], KINDS_OF_CALL["layer-across"]], ids=str)
@pytest.mark.parametrize("tables", [torch.float64, torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tables_and_vectors_of_other_dtypes(
    dtype: torch.dtype, tables: torch.dtype | None, settings: dict[str, Any]
) -> None:
    arguments = draw("joint", dtype, **settings).map(lambda t: t.to(tables or dtype), "cos", "sin")
    arguments = arguments.map(Tensor.float, "weights", "biases")
    for implementation in (norm_rotary, REFERENCE_OP):
        assert_in_tolerance(arguments, arguments.call(implementation))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads-first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim > 2 else t,
    "of-a-wider-row": lambda t: torch.cat([t, t, t], dim=-1)[..., t.shape[-1] : 2 * t.shape[-1]],
    "every-second": lambda t: torch.stack([t, t], dim=-1)[..., 1],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("settings", ["rms-pairs", "layer-across"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view: str, dtype: torch.dtype, settings: str) -> None:
    arguments = draw("joint", dtype, **KINDS_OF_CALL[settings])
    strided = arguments.map(VIEWS[view])
    for found, expected in zip(
        strided.call(norm_rotary), strided.map(Tensor.contiguous).call(norm_rotary), strict=True
    ):
        assert found.is_contiguous()
        assert torch.equal(found, expected)


def test_queries_and_keys_may_differ_in_heads_and_tokens() -> None:
    q, k = torch.randn(2, 5, 6, 8), torch.randn(2, 3, 2, 8)
    both = norm_rotary([q, k], [1, 1], [None] * 2, [None] * 2, [None] * 2, [None] * 2)
    for found, x in zip(both, (q, k), strict=True):
        torch.testing.assert_close(found, functional.rms_norm(x, (8,), eps=1e-5))


def test_a_row_of_odd_width_is_normed() -> None:
    x = torch.randn(2, 5, 7)
    for norm, expected in (("layer", functional.layer_norm(x, (7,))), ("none", x)):
        (found,) = norm_rotary([x], [1], [None], [None], [None], [None], norm=norm)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_are_read_not_memory(implementation: Any, kind: str) -> None:
    arguments = draw(
        "joint",
        torch.float32,
        **KINDS_OF_CALL["rms-pairs"],
    )
    lazy = arguments.map(KINDS[kind])
    expected = lazy.map(torch.clone).call(implementation)
    for found, true in zip(lazy.call(implementation), expected, strict=True):
        assert not found.is_neg()
        assert torch.equal(found, true)


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    for implementation in (norm_rotary, REFERENCE_OP):
        found = implementation([x, x, x], [1, 2], [None] * 3, [None] * 3, [None] * 3, [None] * 3)
        assert [list(t.shape) for t in found] == [list(shape), [shape[0], 2 * shape[1], *shape[2:]]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm", ["rms", "none"])
def test_arguments_stay_as_they_are_and_nothing_aliases(implementation: Any, norm: str) -> None:
    x = torch.randn(2, 3, 2, 8)
    before = x.clone()
    found = implementation([x, x], [1, 1], [None] * 2, [None] * 2, [None] * 2, [None] * 2, norm=norm)
    assert len({t.data_ptr() for t in (x, *found)}) == 3
    assert torch.equal(x, before)


X = torch.zeros(2, 5, 3, 6)
GOOD: dict[str, Any] = {"parts": [X, X], "counts": [2], **{name: [None] * 2 for name in ("weights", "biases")}}
GOOD |= {"cos": [X, X], "sin": [X, X]}
BAD = [
    pytest.param({"counts": [1]}, ValueError, r"counts is \[1\] for 2 parts", id="counts"),
    pytest.param({"counts": [2, 0]}, ValueError, "expected positive numbers", id="zero"),
    pytest.param({"weights": [None]}, ValueError, "got 1 weights for 2 parts", id="weights"),
    pytest.param({"dim": 3}, ValueError, "dim is 3, expected a dimension before the last 1", id="dim"),
    pytest.param({"dim": 2, "across": True}, ValueError, "before the last 2", id="dim-across"),
    pytest.param({"norm": "batch"}, ValueError, "norm is 'batch', expected one of 'none'", id="norm"),
    pytest.param({"parts": [X, X[..., :4]]}, ValueError, r"parts\[1\] has shape \[2, 5, 3, 4\]", id="shapes"),
    pytest.param({"parts": [X, X.half()]}, TypeError, r"parts\[1\] has dtype torch.float16", id="dtypes"),
    pytest.param({"parts": [X.int()] * 2}, TypeError, r"parts\[0\] has dtype torch.int32", id="integers"),
    pytest.param({"weights": [X[0, 0], None]}, ValueError, r"weights\[0\] has shape \[3, 6\], expected", id="vector"),
    pytest.param({"biases": [None, torch.zeros(6).double()]}, TypeError, r"biases\[1\] has dtype", id="bias"),
    pytest.param({"cos": [X, None]}, ValueError, "part 1 has only one of cos and sin", id="no-cos"),
    pytest.param({"cos": [X, X[..., :2]]}, ValueError, r"cos\[1\] has shape \[2, 5, 3, 2\]", id="table"),
    pytest.param({"sin": [X, X[:, :2]]}, ValueError, "does not broadcast to that of its part", id="tokens"),
    pytest.param({"sin": [X, X.half()]}, TypeError, r"sin\[1\] has dtype torch.float16, expected", id="half-table"),
    pytest.param({"parts": [X[..., :5]] * 2}, ValueError, "rows of 5; pairs need an even number", id="odd"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD)
def test_errors_are_the_same_everywhere(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {**GOOD, **changes}
    on_meta = {
        name: [t.to("meta") if isinstance(t, Tensor) else t for t in value] if isinstance(value, list) else value
        for name, value in given.items()
    }
    said = set()
    for implementation in (norm_rotary, norm_rotary_reference, REFERENCE_OP):
        with pytest.raises(kind, match=message) as caught:
            implementation(**given)
        said.add(str(caught.value))
    with pytest.raises(kind, match=message) as caught:
        OP(**on_meta)
    said.add(str(caught.value))
    assert len(said) == 1


@pytest.mark.parametrize("settings", [KINDS_OF_CALL["rms-pairs"], KINDS_OF_CALL["layer-across"]], ids=str)
def test_schema_fake_and_tracing_agree(settings: dict[str, Any]) -> None:
    arguments = draw("joint", torch.bfloat16, **settings)
    torch.library.opcheck(OP, arguments.tensors, arguments.settings)


class Attention(torch.nn.Module):
    """Both results in use, as a graph would have them."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = norm_rotary([q, k], [1, 1], [None] * 2, [None] * 2, [cos] * 2, [sin] * 2)
        return q + k


def test_export_and_compile() -> None:
    arguments = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8), torch.randn(5, 1, 8), torch.randn(5, 1, 8)
    expected = Attention()(*arguments)
    exported = torch.export.export(Attention(), arguments, strict=False)
    assert [node.target for node in exported.graph.nodes].count(OP) == 1
    assert torch.equal(exported.module()(*arguments), expected)
    assert torch.equal(torch.compile(Attention(), backend="aot_eager", fullgraph=True)(*arguments), expected)
