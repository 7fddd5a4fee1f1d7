"""Joins linear layers of one input into one product: queries, keys and values of a self-attention, say.

The layers' parameters, one below the other, are one parameter of the joined product, and each layer's result is a view
of its result. The prologue makes the joined parameters (`JoinedTensor`) anew for each request, so what was written to
the model's own is seen as it is by every other hoisted value.

Hazards: a result that is a view has gaps between its rows. So layers are joined only where every reader takes rows
with gaps: a copy would cost more than is gained. A layer whose result is stored stays, since it writes into its slot,
and so does one that only a GELU follows, which the product applies itself (`epilogue`).

Requires: a body. Ensures: the same values up to rounding; its tables are the same but for hoisted tensors in place of
parameters that only joined layers took.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from harmonica_rt.graph.facts import is_item, is_view, only_user, value_of
from harmonica_rt.graph.match import Op, Operand, matches
from harmonica_rt.graph.rebuild import copy_of
from harmonica_rt.lower.graph_states import BodyGraph
from harmonica_rt.lower.rewriting import Rewriting

aten = torch.ops.aten

ALIGNMENT = 16  # bytes from one result to the next: fused attention loads as many at once
LINEAR = (aten.linear.default,)
PATTERNS = (
    Op(LINEAR, (Operand("rows"), Operand("weight"), Operand("bias"))),
    Op(LINEAR, (Operand("rows"), Operand("weight"))),
)
ATTENTION = aten.scaled_dot_product_attention.default
# Layers before and after one of these belong to different attentions; together, their results would live too long.
MIXING = (ATTENTION, aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.softmax.int)
VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class JoinedTensor:
    """Parameters of one width or, biases, of one dimension, one below the other in one tensor.

    Attributes:
        name: what it is hoisted as.
        parameters: their dotted names in the model.
        nbytes: its bytes.
    """

    name: str
    parameters: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Join:
    """Linear layers of one input, which become one product.

    Attributes:
        layers: names of their nodes in the captured graph, in order.
        tensors: the joined weights and, if they have biases, the joined biases.
    """

    layers: tuple[str, ...]
    tensors: tuple[JoinedTensor, ...]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Join:
        """The product of these layers."""
        tensors = []
        for index, kind in enumerate(("weight", "bias")[: len(layers[0].operands)]):
            names = tuple(layer.parameters[index] for layer in layers)
            nbytes = sum(value_of(layer.operands[index]).nbytes for layer in layers)
            tensors.append(JoinedTensor(f"joined_{kind}_{layers[0].name}", names, nbytes))
        return cls(tuple(layer.name for layer in layers), tuple(tensors))


@dataclass(frozen=True)
class Layer:
    """A linear layer in a body.

    Attributes:
        node: its node.
        rows: its input.
        operands: its weight and, if it has one, its bias.
        parameters: their dotted names in the model.
    """

    node: fx.Node
    rows: fx.Node
    operands: tuple[fx.Node, ...]
    parameters: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of its node in the captured graph."""
        name: str = self.node.meta["captured_name"]
        return name

    @property
    def width(self) -> int:
        """The number of columns of its result."""
        return int(value_of(self.node).shape[-1])


def find_layers(body: BodyGraph) -> list[list[Layer]]:
    """The linear layers that can be joined, in groups of at least two."""
    if body.graph.find_nodes(op="call_function", target=aten.as_strided.default):
        return []  # it reads memory by strides that a join may change
    parameters = dict(zip(body.argument_nodes, body.parameters, strict=False))
    kept = {*body.stored_nodes, *(node for node in body.result_nodes if isinstance(node, fx.Node))}
    groups: dict[Any, list[Layer]] = {}
    mixed = 0
    for node in body.graph.nodes:
        mixed += node.target in MIXING
        layer = _layer(node, parameters) if node not in kept else None
        if layer is not None:
            groups.setdefault((layer.rows, len(layer.operands), mixed), []).append(layer)
    several = (group for group in groups.values() if len(group) > 1)
    fitting = ([layer for layer in group if _takes_gaps(layer.node, _with_gaps(layer))] for group in several)
    return [group for group in fitting if len(group) > 1]


def with_joins(body: BodyGraph, joins: Collection[Join]) -> BodyGraph:
    """The body with one product in place of the layers of each join; where it has not all of them, they stay.

    Args:
        body: the body; it is not changed.
        joins: what may be joined.
    """
    wanted = {join.layers: join for join in joins}
    copied = replace(body, graph=copy_of(body.graph))
    found = [(wanted.get(Join.of(group).layers), group) for group in (find_layers(copied) if joins else [])]
    hoisted: list[str] = []
    rewriting = Rewriting(copied.graph)
    for join, group in found:
        if join is not None:
            _rewrite(rewriting, group, _placeholders(copied, join))
            hoisted += (tensor.name for tensor in join.tensors)
    if not hoisted:
        return body
    rewriting.restride()
    return copied.become(BodyGraph, parameters=_without_idle_parameters(copied), hoisted=(*copied.hoisted, *hoisted))


def _layer(node: fx.Node, parameters: Mapping[fx.Node, str]) -> Layer | None:
    """`node` as a linear layer whose parameters are the model's own, with plain tensors of one dtype."""
    bound = next((bound for pattern in PATTERNS for bound in matches(pattern, node)), None)
    if bound is None or "captured_name" not in node.meta:
        return None
    rows, *operands = bound.values()
    values = [value_of(each) for each in (node, rows, *operands)]
    if not all(each in parameters for each in operands) or not all(isinstance(value, FakeTensor) for value in values):
        return None
    weight = values[2]
    fits = all(bias.shape == weight.shape[:1] for bias in values[3:])  # a bias of one number is broadcast
    is_plain = weight.dim() == 2 and weight.is_contiguous() and fits
    aligned = weight.shape[0] * weight.element_size() % ALIGNMENT == 0
    user = only_user(node)
    if not is_plain or not aligned or len({value.dtype for value in values}) > 1 or not values[0].is_contiguous():
        return None
    if user is not None and user.target is aten.gelu.default:
        return None
    return Layer(node, rows, tuple(operands), tuple(parameters[each] for each in operands))


def _with_gaps(layer: Layer) -> torch.Tensor:
    """The layer's result as a view of a wider one."""
    value: torch.Tensor = value_of(layer.node)
    return value.new_empty((*value.shape[:-1], 2 * layer.width))[..., : layer.width]


def _takes_gaps(node: fx.Node, value: Any) -> bool:
    """Whether nothing that reads `node` has to copy it first, if it is laid out as `value`."""
    for user in node.users:
        if is_view(user) or is_item(user):
            seen = _seen(user, node, value)
            if _storages(seen) != _storages(value) or not _takes_gaps(user, seen):
                return False
        elif not _reads_by_strides(user):
            return False
    return True


def _seen(view: fx.Node, source: fx.Node, value: Any) -> Any:
    """What `view` gives, if `source` is laid out as `value`."""
    args, kwargs = pytree.tree_map_only(
        fx.Node, lambda node: value if node is source else value_of(node), (view.args, view.kwargs)
    )
    target: Any = aten.reshape.default if view.target in VIEWS else view.target
    with torch.no_grad():
        return target(*args, **kwargs)


def _storages(values: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)}


def _reads_by_strides(node: fx.Node) -> bool:
    """Whether an operator takes rows with gaps as fast as others."""
    target = node.target
    if target in (ATTENTION, torch.ops.harmonica.norm_rotary.default):
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _placeholders(body: BodyGraph, join: Join) -> list[fx.Node]:
    """Placeholders for the joined tensors, behind those of the hoisted values."""
    after = (node for node in body.graph.nodes if node.op != "placeholder")
    with body.graph.inserting_before(next(iter(body.read_nodes), None) or next(after)):
        return [body.graph.placeholder(tensor.name) for tensor in join.tensors]


def _rewrite(rewriting: Rewriting, group: Sequence[Layer], joined: Sequence[fx.Node]) -> None:
    """Put one product, and views of its result, in the place of the layers."""
    before = group[0].node
    for placeholder, operands in zip(joined, zip(*(layer.operands for layer in group), strict=True), strict=True):
        with torch.no_grad():
            placeholder.meta["val"] = torch.cat([value_of(operand) for operand in operands])
    product = rewriting.insert(before, aten.linear.default, (group[0].rows, *joined))
    widths = [layer.width for layer in group]
    parts = rewriting.insert(before, aten.split_with_sizes.default, (product, widths, -1))
    results = [rewriting.insert(before, operator.getitem, (parts, index)) for index in range(len(group))]
    for layer, result in zip(group, results, strict=True):
        rewriting.replace(layer.node, result)


def _without_idle_parameters(body: BodyGraph) -> tuple[str, ...]:
    """Erase the placeholders of parameters that nothing takes any more; return the names of the others."""
    names = list(zip(body.argument_nodes, body.parameters, strict=False))
    for node, _ in names:
        if not node.users:
            body.graph.erase_node(node)
    return tuple(name for node, name in names if not node._erased)
