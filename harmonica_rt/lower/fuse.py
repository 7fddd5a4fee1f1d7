"""Fuses residual additions, singly, in chains, and with the norm and modulation after them, into harmonica operators.

A weighted sum that only residuals add is computed where they are (`weighted_terms`), any other by a call of its own.
Queries and keys are fused in `fuse_rotary`, after the residuals.

Requires: a step graph whose nodes carry fake tensors, not yet cut from its prologue (`1 + scale` has to be in it).
Ensures: values stay the same up to rounding, the tables stay the same, every stored value is still a node, and nothing
is shared with the given graph; what does not match is left as it was and counted.

Hazards: a fused call stands where the last addition of its chain stood, and its norm may need operands that come later
in the graph, or that depend on the sum itself. So operands are moved before the call where possible, and the norm is
fused only as far as its operands allow.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from harmonica_rt.graph.facts import is_item, value_of
from harmonica_rt.graph.rebuild import copy_of
from harmonica_rt.graph.weighted_sum import weighted_sum
from harmonica_rt.lower.casts import is_cast, unwidened
from harmonica_rt.lower.fuse_rotary import fuse_rotary
from harmonica_rt.lower.graph_states import FusedGraph
from harmonica_rt.lower.norm_pattern import VIEWS, Norm, find_norms, is_norm
from harmonica_rt.lower.residual_pattern import Residual, find_residual
from harmonica_rt.lower.rewriting import Rewriting, erase, move_before
from harmonica_rt.lower.weighted_terms import Term, lower_sums, sum_below, sums_to_expand, term_of, weighted_sums
from harmonica_rt.plan.step_graph import StepGraph

# Per call: as many as one launch takes in half types. A longer chain becomes several calls of about equal length.
MOST_CACHES = 16

# How the reasons for each kind of thing that is left begin, and what such things are called.
LEFT = {
    "residual": "residuals",
    "norm": "norms",
    "weighted sum": "weighted sums",
    "queries or keys": "queries or keys",
}


@dataclass(frozen=True)
class FusedStep:
    """A fused step graph, with counts of what was fused and what was left.

    Attributes:
        step: the fused graph.
        counts: number of calls of `gated_residual`, `residual_reuse`, `residual_reuse_norm_modulate`, `forecast` and
            `norm_rotary`, and of `residuals left`, `norms left`, `weighted sums left` and `queries or keys left`. A
            single ungated addition, which is one pass already, is not counted.
        reasons: why residuals, norms, weighted sums, and queries and keys were left, with counts.
    """

    step: FusedGraph
    counts: dict[str, int]
    reasons: dict[str, int]


def fuse(step: StepGraph, *, rotary: bool = True, moving: Collection[str] | None = None) -> FusedStep:
    """Rewrite a step graph with fused operators; `step` itself is not changed.

    Args:
        step: the step graph.
        rotary: whether to use `norm_rotary`.
        moving: names of the nodes of the captured graph that depend on the latents; None for all.
    """
    import harmonica_kernels  # noqa: F401  # registers torch.ops.harmonica; planning does not need it

    copied = replace(step, graph=copy_of(step.graph))
    _drop_idle_casts(copied.graph)
    rewriting = Rewriting(copied.graph)
    fusion = _Fusion(copied, rewriting)
    for node in list(copied.graph.nodes):
        if node.users:  # an erased node has none
            fusion.visit(node)
    fusion.counts["forecast"] = lower_sums(rewriting)
    rotary_calls, rotary_reasons = fuse_rotary(rewriting, _moves(moving)) if rotary else (0, Counter[str]())
    rewriting.restride()
    fused = copied.become(FusedGraph)
    reasons = {**_reasons(fused.graph, fusion.slots), **rotary_reasons}
    counts = {**fusion.counts, "norm_rotary": rotary_calls}
    for kind, name in LEFT.items():
        counts[f"{name} left"] = sum(n for reason, n in reasons.items() if reason.startswith(f"{kind}:"))
    return FusedStep(fused, counts, reasons)


def _moves(moving: Collection[str] | None) -> Callable[[fx.Node], bool]:
    """Whether a node depends on the latents; one that a pass has made counts as doing so."""
    names = None if moving is None else {"", *moving}
    return lambda node: names is None or node.meta.get("captured_name", "") in names


class _Fusion:
    """One sweep over a graph, rewriting it in place."""

    def __init__(self, step: StepGraph, rewriting: Rewriting) -> None:
        self._rewriting = rewriting
        sums = weighted_sums(step.graph)
        self.slots = frozenset((*step.read_nodes, *sums))
        found = (find_residual(node, self.slots) for node in (step.graph.nodes if sums else ()))
        self._expanded = sums_to_expand(each for each in found if isinstance(each, Residual))
        self.counts = dict.fromkeys(("gated_residual", "residual_reuse", "residual_reuse_norm_modulate"), 0)

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
        norm = next((each for each in reversed(find_norms(node)) if move_before(node, each.operands)), None)
        gated = any(each.gate is not None or sum_below(each.y) in self._expanded for each in chain)
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
        parts = _parts([term_of(each, self._expanded, self._rewriting, last) for each in chain])
        for part in parts if norm is None else parts[:-1]:
            x = self._sum(last, x, part)
        if norm is not None:
            x, normed = self._norm(last, x, parts[-1], norm)
            self._rewriting.replace(norm.out, normed)
        if last.users:
            self._rewriting.replace(last, x)
        else:
            erase(last)
            erase(x)

    def _sum(self, before: fx.Node, x: fx.Node, part: list[Term]) -> fx.Node:
        ops = torch.ops.harmonica
        caches, gates, weighting = _operands(part)
        if len(caches) == 1:
            places = [weighting["weights"], weighting["places"]] if weighting else []
            return self._call(before, ops.gated_residual.default, (x, caches[0], gates[0], *places))
        return self._call(before, ops.residual_reuse.default, (x, caches, gates, *weighting.values()))

    def _norm(self, before: fx.Node, x: fx.Node, part: list[Term], norm: Norm) -> tuple[fx.Node, fx.Node]:
        scale = norm.scale
        for view in norm.scale_views:
            scale = self._rewriting.insert(before, VIEWS[view.target], (scale, *view.args[1:]), view.kwargs)
        caches, gates, weighting = _operands(part)
        results = self._call(
            before,
            torch.ops.harmonica.residual_reuse_norm_modulate.default,
            (x, caches, gates, norm.weight, norm.bias, scale, norm.shift),
            {**weighting, "rms": norm.rms, "eps": norm.eps},
        )
        hidden, normed = (self._rewriting.insert(before, operator.getitem, (results, index)) for index in (0, 1))
        return hidden, normed

    def _call(
        self, before: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        self.counts[target._schema.name.split("::")[1]] += 1
        return self._rewriting.insert(before, target, args, kwargs)


def _parts(chain: list[Term]) -> list[list[Term]]:
    """The terms of a chain in as few parts as there are calls, with about equal numbers of caches."""
    sizes = [len(term.caches) for term in chain]
    total, most = sum(sizes), max(MOST_CACHES, *sizes)
    calls = -(-total // most)
    while True:
        parts: list[list[Term]] = [[] for _ in range(calls)]
        for term, end in zip(chain, itertools.accumulate(sizes), strict=True):
            parts[(end - len(term.caches)) * calls // total].append(term)
        if all(sum(len(term.caches) for term in part) <= most for part in parts):
            return [part for part in parts if part]
        calls += 1


def _operands(part: list[Term]) -> tuple[list[fx.Node], list[fx.Node | None], dict[str, Any]]:
    """The caches and gates of terms, and weights, places and counts if any has weights, as the operators take them."""
    caches, gates = [cache for term in part for cache in term.caches], [term.gate for term in part]
    found = {term.weights for term in part} - {None}
    if not found:
        return caches, gates, {}
    (weights,) = found  # a step has one tensor of weights per device
    places = [place for term in part for place in term.places]
    return caches, gates, {"weights": weights, "places": places, "counts": [len(term.caches) for term in part]}


def _drop_idle_casts(graph: fx.Graph) -> None:
    """Drop casts to the dtype, device and strides that a tensor already has; models are full of such `.to` calls."""
    for node in list(graph.nodes):
        if is_cast(node):
            before, after = value_of(node.args[0]), value_of(node)
            if (before.dtype, before.device, before.stride()) == (after.dtype, after.device, after.stride()):
                node.replace_all_uses_with(node.args[0])
                erase(node)


def _reasons(graph: fx.Graph, slots: frozenset[fx.Node]) -> dict[str, int]:
    """Why the residuals, norms and weighted sums that are left in a fused graph were not fused, with counts."""
    reasons: Counter[str] = Counter()
    for node in graph.nodes:
        residual = find_residual(node, slots)
        if isinstance(residual, str):
            reasons[residual] += 1
        elif node.target is weighted_sum:
            reasons["weighted sum: its dtype or its layout is none that the operator makes"] += 1
        elif is_norm(node):
            source = unwidened(node.args[0])
            if isinstance(find_residual(source, slots), Residual) or is_item(source):
                reasons["norm: cannot be fused with the sum before it"] += 1
            else:
                reasons["norm: its input is not a residual sum"] += 1
    return dict(reasons)
