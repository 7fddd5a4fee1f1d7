"""`residual_reuse_norm_modulate`: the reference against fp64 and PyTorch's norms, every implementation in tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from harmonica_kernels import residual_reuse, residual_reuse_norm_modulate
from harmonica_kernels._checks import DTYPES
from harmonica_kernels.residual_reuse_norm_modulate.reference import residual_reuse_norm_modulate_reference

OP = torch.ops.harmonica.residual_reuse_norm_modulate.default
REFERENCE_OP = torch.ops.harmonica._residual_reuse_norm_modulate_reference.default
IMPLEMENTATIONS = [pytest.param(residual_reuse_norm_modulate, id="op"), pytest.param(REFERENCE_OP, id="reference")]
SHAPES = [
    pytest.param((2, 16, 64), id="small"),
    pytest.param((2, 5, 77), id="odd-width"),
    pytest.param((2, 23, 1152), id="threaded"),
    pytest.param((1, 3, 3201), id="wider-than-a-block"),
    pytest.param((2, 3, 4, 1536), id="four-dimensions"),
    pytest.param((77,), id="vector"),
]


class Arguments(NamedTuple):
    """The arguments of the op except rms and eps."""

    x: Tensor
    caches: list[Tensor]
    gates: list[Tensor | None]
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        def apply(t: Tensor | None) -> Tensor | None:
            return None if t is None else function(t)

        gates = [apply(gate) for gate in self.gates]
        rest = [apply(t) for t in self[3:]]
        return Arguments(function(self.x), [function(cache) for cache in self.caches], gates, *rest)

    def cast(self, dtype: torch.dtype) -> Arguments:
        return self.map(lambda t: t.to(dtype))


def draw(shape: tuple[int, ...], dtype: torch.dtype, count: int = 3, affine: bool = True) -> Arguments:
    """Gates are [B, 1, ..., D], None and [D] in turn; scale and shift like the first gate, cut from one tensor."""
    x, *caches = torch.randn(count + 1, *shape).unbind()
    per_batch = (*shape[:1], *(1,) * (len(shape) - 2), *shape[1:][-1:])
    gate, scale, shift = torch.randn(*per_batch[:-1], 3 * shape[-1]).chunk(3, dim=-1)
    kinds = [gate, None, torch.randn(shape[-1])]
    weight, bias = torch.randn(2, shape[-1]).unbind() if affine else (None, None)
    gates = [kinds[k % 3] for k in range(count)]
    return Arguments(x, caches, gates, weight, bias, scale, shift).cast(dtype)


def eager(arguments: Arguments, rms: bool, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """PyTorch's own ops, one by one, in the dtype of the arguments."""
    x, caches, gates, weight, bias, scale, shift = arguments
    hidden = x
    for cache, gate in zip(caches, gates, strict=True):
        hidden = hidden + (cache if gate is None else gate * cache)
    norm = functional.rms_norm if rms else functional.layer_norm
    out = norm(hidden, hidden.shape[-1:], eps=eps)
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    out = out if scale is None else out * (1 + scale)
    return hidden, out if shift is None else out + shift


def assert_in_tolerance(arguments: Arguments, found: tuple[Tensor, Tensor], rms: bool, eps: float = 1e-5) -> None:
    """Errors against fp64, largest and RMS: at most twice those of eager PyTorch, or one ulp of the largest value.

    fp64 itself has nothing finer to be held against: it has to be close.
    """
    exact = residual_reuse_norm_modulate_reference(*arguments.cast(torch.float64), rms=rms, eps=eps)
    for ours, theirs, true in zip(found, eager(arguments, rms, eps), exact, strict=True):
        assert ours.dtype == arguments.x.dtype
        assert ours.shape == arguments.x.shape
        assert ours.is_contiguous()
        if ours.dtype == torch.float64:
            torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)
            continue
        ulp = torch.finfo(ours.dtype).eps * true.abs().max()
        error, allowed = ours.double() - true, theirs.double() - true
        assert error.abs().max() <= torch.maximum(2 * allowed.abs().max(), ulp)
        assert error.square().mean().sqrt() <= torch.maximum(2 * allowed.square().mean().sqrt(), ulp)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_reference_is_pytorch_op_by_op(rms: bool) -> None:
    arguments = draw((2, 5, 77), torch.float64)
    found = residual_reuse_norm_modulate_reference(*arguments, rms=rms)
    torch.testing.assert_close(found, eager(arguments, rms), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_tolerance(
    dtype: torch.dtype, shape: tuple[int, ...], rms: bool, implementation: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    arguments = draw(shape, dtype)
    assert_in_tolerance(arguments, implementation(*arguments, rms=rms), rms)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_caches(dtype: torch.dtype, count: int) -> None:
    arguments = draw((2, 5, 77), dtype, count)
    found = residual_reuse_norm_modulate(*arguments)
    assert_in_tolerance(arguments, found, rms=False)
    assert torch.equal(found[0], residual_reuse(*arguments[:3]))


@pytest.mark.parametrize("absent", ["weight", "bias", "scale", "shift", "weight bias scale shift"])
def test_what_is_absent_changes_nothing(absent: str) -> None:
    arguments = draw((2, 5, 77), torch.float32)._replace(**dict.fromkeys(absent.split()))
    assert_in_tolerance(arguments, residual_reuse_norm_modulate(*arguments), rms=False)


@pytest.mark.parametrize(
    "shape", [(2, 9, 40), (2, 9, 1), (9, 40), (40,), (1, 1, 40), ()], ids=lambda shape: str(list(shape))
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scale_and_shift_broadcast(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    arguments = draw((2, 9, 40), dtype)
    for name in ("scale", "shift"):
        changed = arguments._replace(**{name: torch.randn(shape).to(dtype)})
        assert_in_tolerance(changed, residual_reuse_norm_modulate(*changed), rms=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t.mT.contiguous().mT if t.ndim > 1 else t, id="transposed"),
        pytest.param(lambda t: torch.stack([t, t], dim=-1)[..., 1], id="every-second"),
        pytest.param(lambda t: t[:1].expand_as(t), id="expanded"),
        pytest.param(lambda t: t[..., :1].expand_as(t), id="one-number-a-row"),
    ],
)
def test_strided_views(dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    arguments = draw((2, 9, 30), dtype, count=6)
    strided = arguments.map(view)
    dense = strided.map(lambda t: t.contiguous())
    for found, expected in zip(
        residual_reuse_norm_modulate(*strided), residual_reuse_norm_modulate(*dense), strict=True
    ):
        assert found.is_contiguous()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_statistics_are_of_the_unrounded_hidden(implementation: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The numbers beside 256 are lost where hidden is rounded to bf16, and all that the norm has to go by."""
    x = torch.full((1, 64), 256.0, dtype=torch.bfloat16)
    cache = torch.linspace(-0.4, 0.4, 64).to(torch.bfloat16)[None]
    hidden, out = implementation(x, [cache], [None])
    assert torch.equal(hidden, x)
    torch.testing.assert_close(out.float(), functional.layer_norm(cache.float(), (64,)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mean", [1, 3, 1000])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_mean_far_from_zero(dtype: torch.dtype, mean: float) -> None:
    arguments = draw((2, 5, 1152), dtype)
    arguments = arguments._replace(x=arguments.x + mean)
    assert_in_tolerance(arguments, residual_reuse_norm_modulate(*arguments), rms=False)


def test_eps_is_used() -> None:
    arguments = draw((2, 5, 77), torch.float32)
    assert_in_tolerance(arguments, residual_reuse_norm_modulate(*arguments, eps=0.5), rms=False, eps=0.5)
    hidden, out = residual_reuse_norm_modulate(torch.ones(2, 8), [torch.ones(2, 8)], [None])
    assert hidden.eq(2).all()
    assert out.eq(0).all()


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 8), (2, 3, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    for implementation in (residual_reuse_norm_modulate, REFERENCE_OP):
        assert [t.shape for t in implementation(x, [x], [None], scale=x[..., :1])] == [x.shape, x.shape]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_arguments_stay_as_they_are_and_nothing_aliases(
    implementation: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    arguments = draw((2, 3, 8), torch.float32, count=1)
    before = arguments.map(torch.clone)
    hidden, out = implementation(*arguments)
    assert len({hidden.data_ptr(), out.data_ptr(), arguments.x.data_ptr(), arguments.caches[0].data_ptr()}) == 4
    assert torch.equal(arguments.x, before.x)
    assert torch.equal(arguments.caches[0], before.caches[0])


X, D = torch.zeros(2, 5, 6), torch.zeros(6)
BAD = [
    pytest.param(X, {"gates": []}, ValueError, "got 0 gates for 1 caches", id="gates"),
    pytest.param(X, {"weight": D[:4]}, ValueError, r"weight has shape \[4\], expected .* \[6\]", id="weight-shape"),
    pytest.param(X, {"bias": D[None]}, ValueError, r"bias has shape \[1, 6\], expected .* \[6\]", id="bias-shape"),
    pytest.param(X.half(), {"weight": D}, TypeError, "weight has dtype torch.float32, expected that of x", id="weight"),
    pytest.param(X.half(), {"scale": X}, TypeError, "scale has dtype torch.float32, expected that of x", id="scale"),
    pytest.param(X, {"scale": X[:, :2]}, ValueError, r"scale has shape \[2, 2, 6\]", id="scale-shape"),
    pytest.param(X, {"shift": X[None]}, ValueError, r"shift has shape \[1, 2, 5, 6\]", id="shift-rank"),
    pytest.param(X[0, 0, 0], {}, ValueError, "x is a single number, expected", id="number"),
    pytest.param(X.int(), {}, TypeError, "x has dtype torch.int32", id="integers"),
]


@pytest.mark.parametrize(("x", "more", "kind", "message"), BAD)
def test_errors_are_the_same_everywhere(
    x: Tensor, more: dict[str, Tensor], kind: type[Exception], message: str
) -> None:
    said = set()
    arguments = {"x": x, "caches": [x], "gates": [None], **more}
    on_meta = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in arguments.items()}
    on_meta["caches"] = [x.to("meta")]
    for implementation in (residual_reuse_norm_modulate, residual_reuse_norm_modulate_reference, REFERENCE_OP):
        with pytest.raises(kind, match=message) as caught:
            implementation(**arguments)
        said.add(str(caught.value))
    with pytest.raises(kind, match=message) as caught:
        OP(**on_meta)
    said.add(str(caught.value))
    assert len(said) == 1


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schema_fake_and_tracing_agree(dtype: torch.dtype, affine: bool) -> None:
    torch.library.opcheck(OP, draw((2, 3, 8), dtype, affine=affine), {"rms": True, "eps": 1e-6})


class Block(torch.nn.Module):
    """Both results in use, as a graph would have them."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        hidden, out = residual_reuse_norm_modulate(x, [y, y], [gate, None], scale=gate, shift=gate, eps=1e-6)
        return hidden + out


def test_export_and_compile() -> None:
    arguments = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 1, 8)
    expected = Block()(*arguments)

    exported = torch.export.export(Block(), arguments, strict=False)
    assert [node.target for node in exported.graph.nodes].count(OP) == 1
    assert torch.equal(exported.module()(*arguments), expected)

    compiled = torch.compile(Block(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), expected)


def test_backward_is_not_silent() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    _, out = residual_reuse_norm_modulate(x, [torch.ones(2, 3)], [None])
    with pytest.warns(UserWarning, match="residual_reuse_norm_modulate: an autograd kernel was not registered"):
        out.sum().backward()
