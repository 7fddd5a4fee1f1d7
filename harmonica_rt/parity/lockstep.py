"""Runs the reference and the compiled engine side by side on the same inputs, and compares every call.

The reference's result is returned, so the run follows the reference's trajectory, and every step is judged by itself,
unaffected by earlier errors in its inputs.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmonica_rt.call.call import Call
from harmonica_rt.engine import RunKey, Stream
from harmonica_rt.execute.plan_stream import PlanStream
from harmonica_rt.execute.planned_engine import PlannedEngine, ReadingStream
from harmonica_rt.indices import SiteIndex, SiteOutput, StepIndex
from harmonica_rt.lower.plain import Program
from harmonica_rt.options import EXACT
from harmonica_rt.parity.higher import HigherEngine, HigherStream
from harmonica_rt.parity.report import ParityError, ParityReport, StepParity
from harmonica_rt.parity.tolerance import NONE, Allowance, Error, limit_from, same_bits, worst
from harmonica_rt.plan.specialise import Pattern, specialise
from harmonica_rt.reference_engine import ReferenceEngine, ReferenceStream
from harmonica_rt.schedule import Schedule

Tolerance = Literal["auto", "exact", "measured"]


class LockstepEngine:
    """An engine that verifies `planned` against the reference as it goes.

    Args:
        model: the denoiser.
        schedule: the schedule that both run under.
        planned: the compiled engine.
        tolerance: `auto` is exact on CPU for an exact lowering, else measured. Measured also runs a copy of the model
            in the next higher precision.
        raise_at_once: raise ParityError at the first step that fails.
    """

    def __init__(
        self, model: nn.Module, schedule: Schedule, planned: PlannedEngine, *, tolerance: Tolerance, raise_at_once: bool
    ) -> None:
        if tolerance == "auto":
            on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
            tolerance = "exact" if on_cpu and planned.options.lowering in EXACT else "measured"
        self.report = ParityReport(tolerance)
        self.planned = planned
        self.raise_at_once = raise_at_once
        self._model = model
        self._schedule = schedule
        self._reference = ReferenceEngine(model, schedule, planned.watch)  # its own edits to the model are no change

    looks_late = False

    def state(self, call: Call) -> object:
        """See `Engine.state`; if the compiled engine misses a change, its steps will differ."""
        return self.planned.state(call)

    def begin_run(self, key: RunKey | None = None) -> None:
        """Begin a run in all engines, with a new report."""
        self.planned.begin_run(key)
        self.report = ParityReport(self.report.tolerance)

    def higher(self) -> HigherEngine:
        """The reference in the next higher precision, to run by itself."""
        return HigherEngine(self._model, self._schedule)

    def new_stream(self, call: Call) -> Stream:
        """One stream that combines the streams of all engines."""
        higher = HigherStream(self._model, self._schedule) if self.report.tolerance == "measured" else None
        return _LockstepStream(self, self._reference.new_stream(call), self.planned.new_stream(call), higher)


class _LockstepStream:
    def __init__(
        self, engine: LockstepEngine, reference: ReferenceStream, planned: Stream, higher: ReferenceStream | None
    ) -> None:
        self._engine = engine
        self._reference = reference
        self._planned = planned
        self._higher = higher
        self._allowances: defaultdict[int, Allowance] = defaultdict(Allowance)  # by output

    def begin(self) -> None:
        """See `Stream.begin`."""
        for stream in (self._reference, self._planned, self._higher):
            if stream is not None:
                stream.begin()

    def end(self) -> None:
        """See `Stream.end`."""
        self._planned.end()

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """Run all of them, compare, and return the reference's output."""
        expected = self._reference.run(step, call, catch_up=catch_up)
        got = self._planned.run(step, call, catch_up=catch_up)
        truth = self._higher.run(step, call, catch_up=catch_up) if self._higher is not None else None
        higher = _tensors(truth) if truth is not None else None
        parity = _compare(step, _tensors(expected), _tensors(got), higher, self._allowances)
        planned = self._planned.in_use if isinstance(self._planned, ReadingStream) else self._planned
        if not parity.ok and isinstance(planned, PlanStream):
            site = _first_divergent_site(planned, self._reference, self._higher, step, call, catch_up)
            parity = dataclasses.replace(parity, site=site)
        report = self._engine.report
        report.steps.append(parity)
        if not parity.ok and self._engine.raise_at_once:
            raise ParityError(report)
        return expected


def _compare(
    step: int,
    expected: list[torch.Tensor],
    got: list[torch.Tensor],
    truth: list[torch.Tensor] | None,
    allowances: Mapping[int, Allowance],
) -> StepParity:
    """The parity of one call: the worst over all output tensors."""
    if len(expected) != len(got) or any(a.shape != b.shape for a, b in zip(expected, got, strict=False)):
        return StepParity(step, Error(torch.inf, torch.inf), NONE, same_bits=False, ok=False)
    same = all(same_bits(a, b) for a, b in zip(expected, got, strict=True))
    if truth is None:
        errors = [Error.between(b, a) for a, b in zip(expected, got, strict=True)]
        return StepParity(step, worst(errors), NONE, same, ok=same)
    errors = [Error.between(b, t) for b, t in zip(got, truth, strict=True)]
    limits = [allowances[i].limit(a, t) for i, (a, t) in enumerate(zip(expected, truth, strict=True))]
    ok = all(error.within(limit) for error, limit in zip(errors, limits, strict=True))
    return StepParity(step, worst(errors), worst(limits), same, ok)


def _first_divergent_site(
    planned: PlanStream,
    reference: ReferenceStream,
    higher: ReferenceStream | None,
    step: StepIndex,
    call: Call,
    catch_up: bool,
) -> str | None:
    """The first divergent site of a step, in execution order; takes reused sites from slots, recomputes the others."""
    plan = planned.runtime.plan
    captured, entry = plan.captured, plan.steps[step]
    reuse = frozenset[SiteIndex]() if catch_up else plan.patterns[entry.program].reuse
    computed = frozenset(
        SiteOutput(SiteIndex(site), index)
        for site, nodes in enumerate(captured.site_outputs)
        if site not in reuse
        for index in range(len(nodes))
    )
    graph = specialise(captured, Pattern(reuse, computed))
    alive = {s.value.output: s.id for s in plan.table.slots if s.value.first < step <= s.value.last}
    slots = planned.buffers.slots
    program = Program(graph, captured.root)
    writes = [_empty_like(node.meta["val"]) for node in graph.stored_nodes]
    reads = [slots[alive[output]] for output in graph.reads]
    program(planned.runtime.bound(program), call.leaves, reads, writes)
    values = {**dict(zip(graph.reads, reads, strict=True)), **dict(zip(graph.stores, writes, strict=True))}
    for site, name in enumerate(captured.sites):
        mine = [value for output, value in sorted(values.items()) if output.site == site]
        theirs = _tensors(reference.cache.get(SiteIndex(site)))
        above = _tensors(higher.cache.get(SiteIndex(site))) if higher is not None else None
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


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
