"""Finds the site at which the compiled model first differs from the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmonica_rt.call.call import Call
from harmonica_rt.execute.plan_stream import PlanStream
from harmonica_rt.indices import SiteIndex, SiteOutput, StepIndex
from harmonica_rt.lower.plain import Program
from harmonica_rt.parity.tolerance import Error, limit_from, same_bits
from harmonica_rt.plan.histories import histories
from harmonica_rt.plan.specialise import Pattern, specialise
from harmonica_rt.reference_engine import ReferenceStream


def first_divergent_site(
    planned: PlanStream[Any],
    reference: ReferenceStream,
    higher: ReferenceStream | None,
    step: StepIndex,
    call: Call,
    catch_up: bool,
) -> str | None:
    """The first divergent site of a step, in execution order; takes reused sites from slots, recomputes the others."""
    plan = planned.lowered.plan
    captured, entry = plan.captured, plan.steps[step]
    pattern = plan.patterns[entry.program]
    reuse = frozenset[SiteIndex]() if catch_up else pattern.reuse
    computed = frozenset(
        SiteOutput(SiteIndex(site), index)
        for site, nodes in enumerate(captured.site_outputs)
        if site not in reuse
        for index in range(len(nodes))
    )
    graph = specialise(captured, Pattern(reuse, computed, frozenset() if catch_up else pattern.taken))
    history, slots = histories(plan.schedule), {(s.value.output, s.value.first): s.id for s in plan.table.slots}
    program = Program(graph, captured.root)
    writes = [_empty_like(node.meta["val"]) for node in graph.stored_nodes]
    reads = [planned.buffers.slots[slots[o, history.source(step, o.site, age)]] for o, age in graph.reads]
    known = {name: table[step] for name, table in planned.lowered.weights.items()}
    given = [known[name] for name in graph.hoisted]
    program(planned.parameters.of(program), call.leaves, reads, writes, given)
    latest = {output: value for (output, age), value in zip(graph.reads, reads, strict=True) if age == 0}
    values = {**latest, **dict(zip(graph.stores, writes, strict=True))}
    for site, name in enumerate(captured.sites):
        mine = [value for output, value in sorted(values.items()) if output.site == site]
        theirs = tensors_of(reference.cache.get(SiteIndex(site)))
        above = tensors_of(higher.cache.get(SiteIndex(site))) if higher is not None else None
        if not all(_matches_any(value, theirs, above) for value in mine):
            return name
    return None


def _empty_like(fake: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)


def _matches_any(value: torch.Tensor, theirs: list[torch.Tensor], above: list[torch.Tensor] | None) -> bool:
    """Whether any output matches: a graph may list a site's outputs in a different order than the module returns."""
    if above is None:
        return any(same_bits(value, other) for other in theirs)
    return any(
        value.shape == other.shape and Error.between(value, truth).within(limit_from(other, truth))
        for other, truth in zip(theirs, above, strict=True)
    )


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors in what a model or a site returned."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
