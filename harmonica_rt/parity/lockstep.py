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

from harmonica_rt.call.call import Call
from harmonica_rt.engine import RunKey, Stream
from harmonica_rt.execute.plan_stream import PlanStream
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.execute.request_value_stream import RequestValueStream
from harmonica_rt.indices import StepIndex
from harmonica_rt.options import EXACT
from harmonica_rt.parity.divergence import first_divergent_site, tensors_of
from harmonica_rt.parity.higher import HigherEngine, HigherStream
from harmonica_rt.parity.report import ParityError, ParityReport, StepParity
from harmonica_rt.parity.tolerance import NONE, Allowance, Error, same_bits, worst
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

    looks_late = False

    def state(self, call: Call) -> object:
        """See `Engine.state`; if the compiled engine misses a change, its steps will differ."""
        return self.planned.state(call)

    def begin_run(self, key: RunKey | None = None, schedule: Schedule | None = None) -> None:
        """Begin a run in all engines, with a new report."""
        self._schedule = schedule or self._schedule
        self.planned.begin_run(key, self._schedule)
        self.report = ParityReport(self.report.tolerance)

    def higher(self) -> HigherEngine:
        """The reference in the next higher precision, to run by itself."""
        return HigherEngine(self._model, self._schedule)

    def new_stream(self, call: Call) -> Stream:
        """One stream that combines the streams of all engines."""
        higher = HigherStream(self._model, self._schedule) if self.report.tolerance == "measured" else None
        # One watch for both, or what the model changes in itself in a reference run would count as a change by others.
        reference = ReferenceEngine(self._model, self._schedule, self.planned.watch)
        return _LockstepStream(self, reference.new_stream(call), self.planned.new_stream(call), higher)


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
        higher = tensors_of(truth) if truth is not None else None
        parity = _compare(step, tensors_of(expected), tensors_of(got), higher, self._allowances)
        # what ran the call; a call that fell back to the reference has no plan in which to look for a site
        planned = self._planned.in_use if isinstance(self._planned, RequestValueStream) else self._planned
        if not parity.ok and isinstance(planned, PlanStream):
            site = first_divergent_site(planned, self._reference, self._higher, step, call, catch_up)
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
    """The parity of one call, the worst over all output tensors. Exact if there is no `truth` to measure against."""
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
