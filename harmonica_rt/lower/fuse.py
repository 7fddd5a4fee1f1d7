"""Fuses residual additions, singly, in chains, and with the norm and modulation after them, into harmonica operators.

Requires: a step graph whose nodes carry fake tensors, not yet cut from its prologue (`1 + scale` has to be in it).
Ensures: values stay the same up to rounding, the tables stay the same, every stored value is still a node, and nothing
is shared with the given graph; what does not match is left as it was and counted.

Hazards: a fused call stands where the last addition of its chain stood, and its norm may need operands that come later
in the graph, or that depend on the sum itself. So operands are moved before the call where possible, and the norm is
fused only as far as its operands allow. Moreover, the operators return contiguous results, whereas additions keep the
strides of their arguments, which a later `view` may rely on.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from harmonica_rt.errors import InvariantError
from harmonica_rt.graph.facts import is_item, value_of
from harmonica_rt.graph.rebuild import copy_of
from harmonica_rt.lower.casts import is_cast, unwidened
from harmonica_rt.lower.graph_states import FusedGraph
from harmonica_rt.lower.norm_pattern import VIEWS, Norm, find_norms, is_norm
from harmonica_rt.lower.residual_pattern import Residual, find_residual
from harmonica_rt.plan.step_graph import StepGraph

aten = torch.ops.aten

# Per call: as many as one launch takes in half types. A longer chain becomes several calls of about equal length.
MOST_CACHES = 16


@dataclass(frozen=True)
class FusedStep:
    """A fused step graph, with counts of what was fused and what was left.

    Attributes:
        step: the fused graph.
        counts: number of calls of `gated_residual`, `residual_reuse` and `residual_reuse_norm_modulate`, and of
            `residuals left` and `norms left`. A single ungated addition, which is one pass already, is not counted.
        reasons: why residuals and norms were left, with counts.
    """

    step: FusedGraph
    counts: dict[str, int]
    reasons: dict[str, int]


def fuse(step: StepGraph) -> FusedStep:
    """Rewrite a step graph with fused operators; `step` itself is not changed."""
    import harmonica_kernels  # noqa: F401  # registers torch.ops.harmonica; planning does not need it

    copied = replace(step, graph=copy_of(step.graph))
    _drop_idle_casts(copied.graph)
    fusion = _Fusion(copied)
    for node in list(copied.graph.nodes):
        if node.users:  # an erased node has none
            fusion.visit(node)
    _restride(copied.graph, fusion.restrided)
    fused = copied.become(FusedGraph)
    reasons = _reasons(fused.graph, fusion.slots)
    for kind in ("residual", "norm"):
        fusion.counts[f"{kind}s left"] = sum(n for reason, n in reasons.items() if reason.startswith(f"{kind}:"))
    return FusedStep(fused, fusion.counts, reasons)


class _Fusion:
    """One sweep over a graph, rewriting it in place."""

    def __init__(self, step: StepGraph) -> None:
        self.graph = step.graph
        self.slots = frozenset(step.read_nodes)
        self.counts = dict.fromkeys(("gated_residual", "residual_reuse", "residual_reuse_norm_modulate"), 0)
        self.restrided: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        """Rewrite the chain of residuals that ends at `node`, if one does."""
        residual = find_residual(node, self.slots)
        if not isinstance(residual, Residual) or self._continues(node):
            return
        chain = [residual]
        while self._continues(chain[0].x):
            earlier = find_residual(chain[0].x, self.slots)
            assert isinstance(earlier, Residual)
            chain.insert(0, earlier)
        norm = next((each for each in reversed(find_norms(node)) if _move_before(node, each.operands)), None)
        gated = any(each.gate is not None for each in chain)
        if gated or norm is not None or (len(chain) > 1 and any(each.y in self.slots for each in chain)):
            self._rewrite(chain, norm)

    def _continues(self, node: fx.Node) -> bool:
        """Whether `node` is a residual that serves only as the `x` of another."""
        if len(node.users) != 1 or not isinstance(find_residual(node, self.slots), Residual):
            return False
        following = find_residual(next(iter(node.users)), self.slots)
        return isinstance(following, Residual) and following.x is node and node not in (following.y, following.gate)

    def _rewrite(self, chain: list[Residual], norm: Norm | None) -> None:
        last, x = chain[-1].node, chain[0].x
        calls = -(-len(chain) // MOST_CACHES)
        parts = [chain[len(chain) * i // calls : len(chain) * (i + 1) // calls] for i in range(calls)]
        for part in parts if norm is None else parts[:-1]:
            x = self._sum(last, x, part)
        if norm is not None:
            x, normed = self._norm(last, x, parts[-1], norm)
            self._replace(norm.out, normed)
        if last.users:
            self._replace(last, x)
        else:
            _erase(last)
            _erase(x)

    def _sum(self, before: fx.Node, x: fx.Node, part: list[Residual]) -> fx.Node:
        ops = torch.ops.harmonica
        if len(part) == 1:
            return self._call(before, ops.gated_residual.default, (x, part[0].y, part[0].gate))
        return self._call(before, ops.residual_reuse.default, (x, [r.y for r in part], [r.gate for r in part]))

    def _norm(self, before: fx.Node, x: fx.Node, part: list[Residual], norm: Norm) -> tuple[fx.Node, fx.Node]:
        scale = norm.scale
        for view in norm.scale_views:
            scale = self._insert(before, VIEWS[view.target], (scale, *view.args[1:]), view.kwargs)
        results = self._call(
            before,
            torch.ops.harmonica.residual_reuse_norm_modulate.default,
            (x, [r.y for r in part], [r.gate for r in part], norm.weight, norm.bias, scale, norm.shift),
            {"rms": norm.rms, "eps": norm.eps},
        )
        hidden, normed = (self._insert(before, operator.getitem, (results, index)) for index in (0, 1))
        return hidden, normed

    def _call(
        self, before: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        self.counts[target._schema.name.split("::")[1]] += 1
        return self._insert(before, target, args, kwargs)

    def _insert(
        self, before: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["nn_module_stack"] = before.meta.get("nn_module_stack")
        node.meta["val"] = _fake_result(node)
        return node

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        if value_of(old).stride() != value_of(new).stride():
            self.restrided.add(new)
        new.meta = {**old.meta, "val": value_of(new)}
        old.replace_all_uses_with(new)
        _erase(old)


def _drop_idle_casts(graph: fx.Graph) -> None:
    """Drop casts to the dtype, device and strides that a tensor already has; models are full of such `.to` calls."""
    for node in list(graph.nodes):
        if is_cast(node):
            before, after = value_of(node.args[0]), value_of(node)
            if (before.dtype, before.device, before.stride()) == (after.dtype, after.device, after.stride()):
                node.replace_all_uses_with(node.args[0])
                _erase(node)


def _erase(node: fx.Node) -> None:
    """Erase a node that nothing uses, and the nodes that only it used."""
    pending = [node]
    while pending:
        dead = pending.pop()
        if dead.users or dead.op not in ("call_function", "get_attr") or dead._erased:
            continue
        pending.extend(dead.all_input_nodes)
        dead.graph.erase_node(dead)


def _move_before(target: fx.Node, operands: Iterable[fx.Node]) -> bool:
    """Move operands and what they need before `target`; if one needs `target` itself, move nothing and return False."""
    needed: set[fx.Node] = set()
    pending = list(operands)
    while pending:
        node = pending.pop()
        if node is target:
            return False
        if node not in needed and node > target:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    for node in sorted(needed):
        target.prepend(node)
    return True


def _restride(graph: fx.Graph, restrided: set[fx.Node]) -> None:
    """Recompute the fake tensors of the nodes downstream of `restrided` ones, whose strides have changed.

    `view` raises where strides do not allow it, so it becomes `reshape`.
    """
    for node in graph.nodes if restrided else ():
        if node.op != "call_function" or restrided.isdisjoint(node.all_input_nodes):
            continue
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        if node.target is aten.as_strided.default:
            raise InvariantError(f"{node.name} reads memory by strides that fusing changed; use lowering='plain'")
        fresh = _fake_result(node)
        if _strides(fresh) != _strides(value_of(node)):
            restrided.add(node)
        node.meta["val"] = fresh


def _strides(values: Any) -> list[Any]:
    return [leaf.stride() for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _fake_result(node: fx.Node) -> Any:
    """The result of a node on the fake tensors of its arguments."""
    args, kwargs = pytree.tree_map_only(fx.Node, value_of, (node.args, node.kwargs))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _reasons(graph: fx.Graph, slots: frozenset[fx.Node]) -> dict[str, int]:
    """Why the residuals and norms that are left in a fused graph were not fused, with counts."""
    reasons: Counter[str] = Counter()
    for node in graph.nodes:
        residual = find_residual(node, slots)
        if isinstance(residual, str):
            reasons[residual] += 1
        elif is_norm(node):
            source = unwidened(node.args[0])
            if isinstance(find_residual(source, slots), Residual) or is_item(source):
                reasons["norm: cannot be fused with the sum before it"] += 1
            else:
                reasons["norm: its input is not a residual sum"] += 1
    return dict(reasons)
