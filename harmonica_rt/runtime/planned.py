"""The compiled engine: captures and plans at the first call of a signature, and keeps the plans in a bounded cache."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from harmonica_rt.capture.call import Call, Signature
from harmonica_rt.capture.graph import capture
from harmonica_rt.capture.reads import RequestReads
from harmonica_rt.capture.reasons import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.capture.roles import roles
from harmonica_rt.capture.snapshot import ModelSnapshot, check_capturable, named_tensors, plain_tensors
from harmonica_rt.errors import PlanFileError
from harmonica_rt.indices import StepIndex
from harmonica_rt.plan import saved
from harmonica_rt.plan.plan import build_plan
from harmonica_rt.runtime.engine import RunKey, Stream
from harmonica_rt.runtime.execution import PlanRuntime
from harmonica_rt.runtime.graphs import Graphs
from harmonica_rt.runtime.plans import Plans
from harmonica_rt.runtime.reference import ReferenceEngine
from harmonica_rt.schedule import Schedule

log = logging.getLogger(__name__)


class FallbackWarning(UserWarning):
    """A model could not be captured and runs eagerly with the same schedule: same images, less speed."""


class LiveWeights:
    """The parameters and buffers of a model by name, as its snapshot last saw them.

    Plans hold this in the place of the engine that holds them, so that they are freed with it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.snapshot: ModelSnapshot | None = None
        self._model = model

    def __call__(self) -> dict[str, torch.Tensor]:
        """The same mapping as long as no tensor was replaced."""
        return self.snapshot.tensors if self.snapshot is not None else named_tensors(self._model)


class ReadingStream:
    """A stream over plans that hold only for what the model reads of the request they were made for."""

    def __init__(self, engine: PlannedEngine, stream: Stream, reads: RequestReads) -> None:
        self._engine = engine
        self._held: list[tuple[Stream, RequestReads | None]] = [(stream, reads)]  # the one in use first
        self._asked = True  # whether the request at hand reads what the stream in use holds for
        self._begun = False

    @property
    def in_use(self) -> Stream:
        """The stream of the request at hand."""
        return self._held[0][0]

    def begin(self) -> None:
        """See `Stream.begin`."""
        self.in_use.begin()
        self._asked = not self._begun  # the first request is the one that the stream was made for
        self._begun = True

    def end(self) -> None:
        """See `Stream.end`."""
        self.in_use.end()

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """See `Stream.run`."""
        if not self._asked:
            self._choose(call)
        return self.in_use.run(step, call, catch_up=catch_up)

    def _choose(self, call: Call) -> None:
        """Use the stream that holds for what the model reads of this request."""
        self._asked = True
        fitting = next((one for one in self._held if one[1] is None or one[1].hold(call.leaves)), None)
        if fitting is self._held[0]:
            return
        self.end()
        if fitting is None:
            self._held.insert(0, self._engine.stream_for(call))
        else:
            self._held.remove(fitting)
            self._held.insert(0, fitting)
            fitting[0].begin()


class PlannedEngine:
    """Captures and plans at the first call of each signature; runs the reference where that is not possible.

    Args:
        model: the denoiser, in eval mode.
        schedule: what to reuse when.
        lowering: how step programs are made, one of `harmonica_rt.lower.LOWERINGS`.
        strict: raise CaptureError instead of falling back.
        max_plans: plans kept; the one unused longest goes first.
        max_plan_bytes: that all plans may hold, see `harmonica_rt.runtime.plans.check_limits`.
        debug: fill slots with NaN before they are written and after their last read.
        graphs: how step programs become graphs; None runs them launch by launch.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        lowering: str,
        strict: bool,
        max_plans: int,
        debug: bool,
        graphs: Graphs | None = None,
        max_plan_bytes: int | None = None,
    ) -> None:
        self.lowering = lowering
        self.cache = Plans(
            type(model).__name__,
            lowering=lowering,
            graphs=graphs,
            debug=debug,
            limit=max_plans,
            max_bytes=max_plan_bytes,
        )
        self.failures: dict[Signature, CaptureFailure] = {}
        self._model = model
        self._schedule = schedule
        self._strict = strict
        self._weights = LiveWeights(model)
        self._reference = ReferenceEngine(model, schedule)

    @property
    def plans(self) -> dict[Signature, PlanRuntime]:
        """The plans in the cache, the one used last at the end."""
        return self.cache.held

    def begin_run(self, key: RunKey | None = None) -> None:
        """Drop plans that the model has outgrown; fetch its weights anew."""
        difference = self._difference()
        if difference is not None:
            log.warning("%s was captured again: %s", type(self._model).__name__, difference)
            self.cache.clear()
            self.failures.clear()
            self._weights.snapshot = None
        self.cache.begin_run(key)

    def new_stream(self, call: Call) -> Stream:
        """A stream over the plan for the signature of `call`, captured now if there is none."""
        stream, reads = self.stream_for(call)
        return stream if reads is None else ReadingStream(self, stream, reads)

    def stream_for(self, call: Call) -> tuple[Stream, RequestReads | None]:
        """A stream for `call`, and the values of its request that it holds for; None where it holds for all."""
        found = self._planned_for(call)
        if found is None and call.signature not in self.failures:
            found = self._add_plan(call)
        if found is None:
            return self._reference.new_stream(call), None
        return found.new_stream(), found.plan.captured.reads

    def _planned_for(self, call: Call) -> PlanRuntime | None:
        """The plan for the signature of `call`, and for what the model reads of its request."""
        signature = call.signature
        if signature in self.cache:
            return self.cache[signature]
        for held, runtime in self.plans.items():
            if held.read and dataclasses.replace(held, read=()) == signature:
                reads = runtime.plan.captured.reads
                if reads is not None and reads.hold(call.leaves):
                    return self.cache[held]
        return None

    def saved(self) -> list[dict[str, Any]]:
        """All plans as plain JSON values.

        Raises:
            PlanFileError: one has no such form, or the model is not as it was when they were made.
        """
        difference = self._difference()
        if difference is not None:
            raise PlanFileError(f"the plans are of the model as it was: {difference}. Run it once more, then save")
        attributes = plain_tensors(self._model)
        return [
            saved.encode(runtime.plan, signature, runtime.roles, attributes)
            for signature, runtime in self.plans.items()
        ]

    def restore(self, records: Iterable[dict[str, Any]]) -> None:
        """Keep plans that `saved` gave, for a model that is as it was then.

        Raises:
            CaptureError: the model is in a state that no plan can stand for.
            PlanFileError, InvariantError: not what `saved` gave.
            RegionError: Inductor cannot compile a region.
        """
        check_capturable(self._model)
        self._weights.snapshot = ModelSnapshot(self._model)
        attributes = plain_tensors(self._model)
        for record in records:
            started = time.perf_counter()
            plan, signature, leaf_roles = saved.decode(record, self._schedule, attributes)
            self.cache.add(signature, plan, self._weights, leaf_roles, started=started)

    def _add_plan(self, call: Call) -> PlanRuntime | None:
        started = time.perf_counter()
        name = type(self._model).__name__
        try:
            captured = capture(self._model, call, self._schedule.sites)
        except CaptureError as error:
            # What the user can mend at once is no reason to run slowly.
            if self._strict or error.failure.obstacle in (Obstacle.TRAINING, Obstacle.SITE):
                raise
            self.failures[call.signature] = error.failure
            message = f"{name} runs without a compiled plan, eagerly with the same schedule. {error.failure}"
            log.warning("%s", message)
            warnings.warn(message, FallbackWarning, stacklevel=2)
            return None
        finally:
            if self._weights.snapshot is None:  # after the capture: a model may make tables when it first runs
                self._weights.snapshot = ModelSnapshot(self._model)
        signature = call.signature
        if captured.reads is not None:
            signature = dataclasses.replace(signature, read=captured.reads.key)
        plan = build_plan(captured, self._schedule)
        return self.cache.add(signature, plan, self._weights, roles(call), started=started)

    def _difference(self) -> str | None:
        snapshot = self._weights.snapshot
        return snapshot.difference(self._model) if snapshot is not None else None
