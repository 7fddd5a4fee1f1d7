"""Finds norms that follow a residual sum, with the scale and shift after them.

Hazard: fusing what only looks like a match changes values. So every operand is checked for the shapes and dtypes that
the fused operators take, and a cast is ignored only where the operators do the same arithmetic internally (half types
widened to fp32, and rounded once at the end).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from harmonica_rt.graph.facts import arguments_of, only_user, value_of
from harmonica_rt.graph.match import Anything, LastDim, Number, Op, Operand, matches
from harmonica_rt.lower.casts import arithmetic, as_dtype, is_cast, unwidened

aten = torch.ops.aten

LAYER_NORMS = (aten.layer_norm.default, aten.native_layer_norm.default)
RMS_NORMS = (aten.rms_norm.default, aten._fused_rms_norm.default)
# Views that commute with adding one to every element, each with the operator that does the same for any source strides.
VIEWS: dict[Any, Any] = {
    aten.unsqueeze.default: aten.unsqueeze.default,
    aten.expand.default: aten.expand.default,
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.reshape.default: aten.reshape.default,
}

_ADD = (aten.add.Tensor, aten.add.Scalar)
SQUARE = Op((aten.pow.Tensor_Scalar,), (Operand("squared"), 2))
# `mean` may be given a dtype; it does not matter, as the fused operators compute in their own.
MEAN_SQUARE = Op((aten.mean.dim,), (SQUARE, LastDim(), True, Anything()))
INVERSE_RMS = Op((aten.rsqrt.default,), (Op(_ADD, (MEAN_SQUARE, Number("eps"))),))
WRITTEN_OUT_RMS = Op((aten.mul.Tensor,), (Operand("x"), INVERSE_RMS), commutes=True)
ONE_ADDED = Op(_ADD, (Operand("scale"), 1))
SCALED = Op((aten.mul.Tensor,), (Operand("normed"), Operand("other")), commutes=True)
SHIFTED = Op((aten.add.Tensor,), (Operand("normed"), Operand("other")), commutes=True)


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension of a sum, with the operations after it that were matched, up to `out`.

    `scale` is the operand of `1 + scale`; `scale_views` are the views to apply to it, in order.
    """

    out: fx.Node
    rms: bool
    eps: float
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    scale: fx.Node | None = None
    scale_views: tuple[fx.Node, ...] = ()
    shift: fx.Node | None = None

    @property
    def operands(self) -> list[fx.Node]:
        """The nodes it needs besides the sum."""
        return [node for node in (self.weight, self.bias, self.scale, self.shift) if node is not None]


def find_norms(total: fx.Node) -> list[Norm]:
    """Matches of the first norm that reads `total`; each entry extends further than the one before it.

    Each entry can be replaced on its own: its `out` has the shape of `total` and its dtype, or is cast to that dtype by
    all that read it, and the nodes between have no other users. The caller must check that the operands can be computed
    before `total`.
    """
    for norm in _norms_of(total):
        found = list(_followed(norm, value_of(total)))
        if found:
            return found
    return []


def is_norm(node: fx.Node) -> bool:
    """Whether `node` is a LayerNorm or RMSNorm operator, or the first operation of an RMSNorm written out."""
    return node.target in (*LAYER_NORMS, *RMS_NORMS) or _written_out_rms(node, None) is not None


def _norms_of(total: fx.Node) -> Iterator[Norm]:
    sources = [total, *(user for user in total.users if unwidened(user) is total)]
    for source in sources:
        for user in list(source.users):
            if user.target in (*LAYER_NORMS, *RMS_NORMS):
                norm = _norm_operator(user, source, value_of(total))
                if norm is not None:
                    yield norm
            else:
                written_out = _written_out_rms(user, sources)
                if written_out is not None:
                    yield Norm(written_out[0], rms=True, eps=written_out[1])


def _norm_operator(node: fx.Node, source: fx.Node, total: torch.Tensor) -> Norm | None:
    arguments = arguments_of(node)
    if arguments["input"] is not source or list(arguments["normalized_shape"]) != [total.shape[-1]]:
        return None
    given = [arguments.get("weight"), arguments.get("bias")]
    weight, bias = (None if each is None else as_dtype(each, total.dtype) for each in given)
    if [weight is None, bias is None] != [each is None for each in given]:
        return None
    out: fx.Node | None = node
    if not isinstance(value_of(node), torch.Tensor):
        firsts = [user for user in node.users if user.args[1] == 0]
        out = firsts[0] if len(firsts) == len(node.users) == 1 else None
    if out is None:
        return None
    eps = arguments["eps"]
    if eps is None:  # the epsilon of the dtype computed in, as in ATen
        eps = torch.finfo(arithmetic(total.dtype)).eps
    return Norm(out, rms=node.target in RMS_NORMS, eps=float(eps), weight=weight, bias=bias)


def _written_out_rms(square: fx.Node, sources: list[fx.Node] | None) -> tuple[fx.Node, float] | None:
    """Match `WRITTEN_OUT_RMS` from its first operation; return the product and eps, or None.

    `sources` are the nodes that `x` may be; None allows any.
    """
    if square.target not in SQUARE.targets:
        return None
    product: fx.Node | None = square
    for _ in range(4):  # the mean, the sum with eps, the square root, the product
        product = None if product is None else only_user(product)
    if product is None:
        return None
    for bound in matches(WRITTEN_OUT_RMS, product):
        if bound["squared"] is square.args[0] and (sources is None or bound["x"] in sources):
            return product, bound["eps"]
    return None


def _followed(norm: Norm, total: torch.Tensor) -> Iterator[Norm]:
    """`norm`, and all that it can be extended to; only those whose result has, or is cast to, the dtype of `total`."""
    current: Norm | None = norm
    while current is not None:
        if value_of(current.out).dtype == total.dtype or _is_cast_by_autocast(current.out, total.dtype):
            yield current
        current = _next(current, total)


def _is_cast_by_autocast(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether autocast rounds `node`, which is in the dtype computed in, to `dtype` wherever it is read.

    Under autocast on CUDA a norm of a half type gives fp32, and linear layers cast what they take: no node of the graph
    shows it, only the dtype of their results.
    """
    if not node.users or value_of(node).dtype is not arithmetic(dtype):
        return False
    return all(
        user.target is aten.linear.default
        and user.args[0] is node
        and node not in user.args[1:]
        and value_of(user).dtype is dtype
        for user in node.users
    )


def _next(norm: Norm, total: torch.Tensor) -> Norm | None:
    """`norm` extended by its only user, if that is a cast or applies a weight, a scale or a shift; else None."""
    user = only_user(norm.out)
    if user is None or not isinstance(user.meta.get("val"), torch.Tensor):
        return None
    if value_of(user).shape != total.shape or value_of(user).dtype not in (total.dtype, arithmetic(total.dtype)):
        return None
    if is_cast(user):
        return replace(norm, out=user) if value_of(user).device == total.device else None
    factor = _other_operand(SCALED, user, norm.out)
    if factor is not None and norm.scale is None:
        scale, views = _one_added(factor, total.dtype)
        if scale is not None:
            return replace(norm, out=user, scale=scale, scale_views=views)
        weight = as_dtype(factor, total.dtype)
        if norm.weight is None and norm.bias is None and weight is not None and value_of(factor).dim() == 1:
            return replace(norm, out=user, weight=weight) if value_of(factor).shape[0] == total.shape[-1] else None
    added = _other_operand(SHIFTED, user, norm.out)
    shift = None if added is None else as_dtype(added, total.dtype)
    if shift is not None and norm.scale is not None and norm.shift is None:
        return replace(norm, out=user, shift=shift)
    return None


def _one_added(node: fx.Node, dtype: torch.dtype) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """`scale` if `node` is `1 + scale` under views and widening casts, else None; and those views."""
    views: list[fx.Node] = []
    while node.target in VIEWS or unwidened(node) is not node:
        if node.target in VIEWS:
            views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    found = next(matches(ONE_ADDED, node), None)
    return (None, ()) if found is None else (as_dtype(found["scale"], dtype), tuple(reversed(views)))


def _other_operand(pattern: Op, node: fx.Node, one: fx.Node) -> fx.Node | None:
    """What `node` adds to `one` or multiplies it by; None if it does neither, or if that is `one` itself."""
    return next(
        (bound["other"] for bound in matches(pattern, node) if bound["normed"] is one is not bound["other"]), None
    )
