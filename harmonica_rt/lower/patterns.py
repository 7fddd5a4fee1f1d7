"""What the fuse pass looks for: residual additions, and the norm and modulate that read one.

Hazard: fusing what only looks like a match changes values. So every operand is checked for the shapes and dtypes that
the fused operators take, and a cast is ignored only where the operators do the same arithmetic internally (half types
widened to fp32, and rounded once at the end).

`x + gate * y` also occurs where there is no residual (rotary embeddings are sums of two products). A residual is
recognised by where `y` comes from: a slot, an input, or another module than the one that adds. All functions here only
read the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASTS = (aten.to, aten._to_copy, aten.type_as)
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


@dataclass(frozen=True)
class Residual:
    """`node = x + gate * y`, or `x + y` without a gate; `x` and `y` have the shape of `node`."""

    node: fx.Node
    x: fx.Node
    y: fx.Node
    gate: fx.Node | None


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


def value(node: fx.Node) -> Any:
    """The fake tensor (or list of them) that a node stands for."""
    return node.meta["val"]


def find_residual(node: fx.Node, slots: Set[fx.Node]) -> Residual | str | None:
    """Match `node` as a residual addition.

    Returns:
        The residual; or the reason, for one that the operators do not take; or None for anything else.
    """
    operands = _tensor_operands(node, aten.add.Tensor)
    if operands is None:
        return None
    shape = value(node).shape
    found: list[Residual] = []
    reasons: set[str] = set()
    for x, added in (operands, operands[::-1]):
        for y, gate in _readings(added, x):
            if value(x).shape != shape or not _comes_from_elsewhere(y, node, slots):
                continue
            tensors = [value(each) for each in (node, x, y, gate) if each is not None]
            if value(y).shape != shape or (gate is not None and not _broadcasts(value(gate).shape, shape)):
                if y in slots:
                    reasons.add("residual: the shape of the slot is not that of the sum")
            elif len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1 or tensors[0].dtype not in DTYPES:
                if y in slots or gate is not None:
                    reasons.add("residual: dtypes or devices differ")
            elif shape:
                found.append(Residual(node, x, y, gate))
    if found:
        # Which of several readings: a gate saves a pass, a slot is never the running sum, a sum is likely to be it.
        return max(found, key=lambda r: (r.gate is not None, r.y in slots, r.x.target is aten.add.Tensor))
    return min(reasons, default=None)


def _readings(added: fx.Node, x: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """Each possible `(y, gate)` of what is added to `x`: both readings of a product used nowhere else, and no gate."""
    factors = _own_factors(added)
    if factors is not None and _own_factors(x) is None:
        yield factors
        yield factors[::-1]
    yield added, None


def _own_factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    return _tensor_operands(node, aten.mul.Tensor) if len(node.users) == 1 else None


def _comes_from_elsewhere(y: fx.Node, addition: fx.Node, slots: Set[fx.Node]) -> bool:
    """Whether `y`, possibly through views, is a slot, an input, or from another module than the one that adds it."""
    while y not in slots and _is_view(y):
        y = y.all_input_nodes[0]
    return y in slots or _module(y) is None or _module(y) != _module(addition)


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None


def _module(node: fx.Node) -> str | None:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else None


def find_norms(total: fx.Node) -> list[Norm]:
    """Matches of the first norm that reads `total`; each entry extends further than the one before it.

    Each entry can be replaced on its own: its `out` has the dtype and shape of `total`, and the nodes between have no
    other readers. The caller must check whether the operands are available before `total`.
    """
    for norm in _norms_of(total):
        found = list(_followed(norm, value(total)))
        if found:
            return found
    return []


def is_norm(node: fx.Node) -> bool:
    """Whether `node` is a norm over a last dimension, or the first operation of one written out."""
    return node.target in (*LAYER_NORMS, *RMS_NORMS) or _written_out_rms(node, None) is not None


def unwidened(node: fx.Node) -> fx.Node:
    """The node before a cast to the dtype that the operators compute in; the node itself if it is no such cast."""
    if is_cast(node):
        (source,) = node.all_input_nodes[:1]
        a, b = value(source), value(node)
        if b.device == a.device and b.dtype in (a.dtype, _arithmetic(a.dtype)):
            return source
    return node


def is_cast(node: fx.Node) -> bool:
    """Whether `node` only converts a tensor to another dtype or device."""
    return getattr(node.target, "overloadpacket", None) in CASTS


def _norms_of(total: fx.Node) -> Iterator[Norm]:
    sources = [total, *(user for user in total.users if unwidened(user) is total)]
    for source in sources:
        for user in list(source.users):
            if user.target in (*LAYER_NORMS, *RMS_NORMS):
                norm = _norm_operator(user, source, value(total))
                if norm is not None:
                    yield norm
            else:
                written_out = _written_out_rms(user, sources)
                if written_out is not None:
                    yield Norm(written_out[0], rms=True, eps=written_out[1])


def _norm_operator(node: fx.Node, source: fx.Node, total: torch.Tensor) -> Norm | None:
    arguments = _arguments(node)
    if arguments["input"] is not source or list(arguments["normalized_shape"]) != [total.shape[-1]]:
        return None
    given = [arguments.get("weight"), arguments.get("bias")]
    weight, bias = (None if each is None else _as_dtype(each, total.dtype) for each in given)
    if [weight is None, bias is None] != [each is None for each in given]:
        return None
    out: fx.Node | None = node
    if not isinstance(value(node), torch.Tensor):
        firsts = [user for user in node.users if user.args[1] == 0]
        out = firsts[0] if len(firsts) == len(node.users) == 1 else None
    if out is None:
        return None
    eps = arguments["eps"]
    if eps is None:  # that of the dtype computed in, as in ATen
        eps = torch.finfo(_arithmetic(total.dtype)).eps
    return Norm(out, rms=node.target in RMS_NORMS, eps=float(eps), weight=weight, bias=bias)


def _written_out_rms(square: fx.Node, sources: list[fx.Node] | None) -> tuple[fx.Node, float] | None:
    """Match `x * rsqrt(mean(x ** 2) + eps)` from its first operation; return the product and eps, or None.

    `sources` are the nodes that `x` may be; None allows any.
    """
    if square.target is not aten.pow.Tensor_Scalar or square.args[1] != 2:
        return None
    mean = _only_user(square)
    if mean is None or mean.target is not aten.mean.dim:
        return None
    arguments = _arguments(mean)
    if list(arguments["dim"]) not in ([-1], [value(square).dim() - 1]) or arguments["keepdim"] is not True:
        return None
    shifted = _only_user(mean)
    eps = _number_added(shifted, mean)
    if shifted is None or eps is None:
        return None
    inverse = _only_user(shifted)
    if inverse is None or inverse.target is not aten.rsqrt.default:
        return None
    product = _only_user(inverse)
    factors = None if product is None else _tensor_operands(product, aten.mul.Tensor)
    if product is None or factors is None or (sources is not None and not set(factors) & set(sources)):
        return None
    return product, eps


def _followed(norm: Norm, total: torch.Tensor) -> Iterator[Norm]:
    current: Norm | None = norm
    while current is not None:
        if value(current.out).dtype == total.dtype:
            yield current
        current = _next(current, total)


def _next(norm: Norm, total: torch.Tensor) -> Norm | None:
    """`norm` extended by its only reader, if that is a cast or applies a weight, a scale or a shift; else None."""
    user = _only_user(norm.out)
    if user is None or not isinstance(user.meta.get("val"), torch.Tensor):
        return None
    if value(user).shape != total.shape or value(user).dtype not in (total.dtype, _arithmetic(total.dtype)):
        return None
    if is_cast(user):
        return replace(norm, out=user) if value(user).device == total.device else None
    factor = _other_operand(user, norm.out, aten.mul.Tensor)
    if factor is not None and norm.scale is None:
        scale, views = _one_added(factor, total.dtype)
        if scale is not None:
            return replace(norm, out=user, scale=scale, scale_views=views)
        weight = _as_dtype(factor, total.dtype)
        if norm.weight is None and norm.bias is None and weight is not None and value(factor).dim() == 1:
            return replace(norm, out=user, weight=weight) if value(factor).shape[0] == total.shape[-1] else None
    added = _other_operand(user, norm.out, aten.add.Tensor)
    shift = None if added is None else _as_dtype(added, total.dtype)
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
    if node.target not in (aten.add.Tensor, aten.add.Scalar) or not isinstance(node.args[0], fx.Node):
        return None, ()
    if _number_added(node, node.args[0]) != 1:
        return None, ()
    return _as_dtype(node.args[0], dtype), tuple(reversed(views))


def _as_dtype(node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """The node or what it was widened from, whichever has `dtype`; None if neither has."""
    return next((each for each in (node, unwidened(node)) if value(each).dtype == dtype), None)


def _number_added(node: fx.Node | None, to: fx.Node) -> float | None:
    if node is None or node.target not in (aten.add.Tensor, aten.add.Scalar) or node.kwargs or len(node.args) != 2:
        return None
    number = node.args[1]
    return float(number) if node.args[0] is to and isinstance(number, (int, float)) else None


def _tensor_operands(node: fx.Node, target: Any) -> tuple[fx.Node, fx.Node] | None:
    """Both operands of a call of `target`, if both are tensors and no other argument (such as `alpha`) is given."""
    if node.target is not target or node.kwargs or len(node.args) != 2:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _other_operand(node: fx.Node, one: fx.Node, target: Any) -> fx.Node | None:
    operands = _tensor_operands(node, target)
    if operands is None or operands[0] is operands[1]:
        return None
    return operands[1] if operands[0] is one else operands[0]


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen operator by name, defaults filled in."""
    target: Any = node.target
    arguments = target._schema.arguments
    given = {argument.name: arg for argument, arg in zip(arguments, node.args, strict=False)}
    return {**{argument.name: argument.default_value for argument in arguments}, **given, **node.kwargs}


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    if len(shape) > len(target):
        return False
    return all(n in (1, wanted) for n, wanted in zip(reversed(shape), reversed(target), strict=False))
