"""The compiled engine: captures and plans at the first call of a signature, and keeps the plans in a bounded cache."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from harmonica_rt.call.call import Call
from harmonica_rt.call.roles import roles
from harmonica_rt.capture.capture import capture
from harmonica_rt.capture.request_values import RequestReads
from harmonica_rt.changes import Changes
from harmonica_rt.engine import RunKey, Stream
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle, PlanFileError
from harmonica_rt.execute.cuda_graphs import Graphs, graphs_of
from harmonica_rt.execute.plan_cache import PlanKey, Plans
from harmonica_rt.execute.plan_stream import PlanRuntime
from harmonica_rt.indices import StepIndex
from harmonica_rt.model.facts import Facts
from harmonica_rt.model.refusals import check_capturable
from harmonica_rt.model.watch import ModelState, ModelWatch
from harmonica_rt.options import CompileOptions
from harmonica_rt.plan.plan import build_plan
from harmonica_rt.planfile import plan_record
from harmonica_rt.planfile.graph_record import ModelFacts
from harmonica_rt.reference_engine import ReferenceEngine
from harmonica_rt.schedule import Schedule
from harmonica_rt.schedule.sites import check_sites
from harmonica_rt.torch_state import keep_torch_state

log = logging.getLogger(__name__)


class FallbackWarning(UserWarning):
    """A model could not be captured and runs eagerly with the same schedule: same images, less speed."""


NEW_STATES = 4  # new states of the model per run that plans are made for; in further ones it runs eagerly


class ReadingStream:
    """A stream over plans that hold only for requests with the values that the model read when they were made."""

    def __init__(self, engine: PlannedEngine, stream: Stream, reads: RequestReads) -> None:
        self._engine = engine
        self._held: list[tuple[Stream, RequestReads | None]] = [(stream, reads)]  # the one in use first
        self._asked = True  # whether the stream in use is known to hold for the current request
        self._begun = False

    @property
    def in_use(self) -> Stream:
        """The stream of the current request."""
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
        """Switch to the stream that holds for what the model reads of this request."""
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
        options: how plans are made and kept.
        graphs: used instead of what `options.graphs` selects; for benchmarks and tests.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        options: CompileOptions,
        graphs: Graphs | None = None,
    ) -> None:
        self.options = options
        self.cache = Plans(type(model).__name__, options, graphs or graphs_of(options.graphs))
        self.failures: dict[PlanKey, CaptureFailure] = {}
        self._model = model
        self._schedule = schedule
        self.watch = ModelWatch(model)
        self._state: ModelState | None = None  # the model's state as the last call found it
        self._change: str | None = None  # the model's last change, if no plan was made for it yet
        self._new: list[Facts] = []  # states of the model first seen in this run
        self._said_restless = False  # in this run
        self._ran_eagerly = False  # in this run
        self._reference = ReferenceEngine(model, schedule, self.watch)

    @property
    def plans(self) -> dict[PlanKey, PlanRuntime]:
        """The plans in the cache, from the least to the most recently used."""
        return self.cache.held

    @property
    def failures_now(self) -> dict[PlanKey, CaptureFailure]:
        """Why calls run eagerly, for the model as the last call found it."""
        facts = self._state.facts if self._state is not None else None
        return {key: failure for key, failure in self.failures.items() if key.model is facts}

    @property
    def looks_late(self) -> bool:
        """True on a GPU: its queue is filled before the host checks the model."""
        return not self._ran_eagerly and any(key.signature.device.type == "cuda" for key in self.plans)

    def state(self, call: Call) -> ModelState:
        """See `Engine.state`; plans are made for a state, and kept in case it comes back."""
        before, self._state = self._state, self.watch.look()
        if before is not None and self._state.facts is not before.facts:
            self._change = self.watch.difference
        return self._state

    def begin_run(self, key: RunKey | None = None) -> None:
        """All streams are over; weights are fetched anew."""
        self.watch.begin_run()
        self._new.clear()
        self._said_restless = self._ran_eagerly = False
        self.cache.begin_run(key)

    def new_stream(self, call: Call) -> Stream:
        """A stream over the plan for the signature of `call`, captured now if there is none."""
        stream, reads = self.stream_for(call)
        return stream if reads is None else ReadingStream(self, stream, reads)

    def stream_for(self, call: Call) -> tuple[Stream, RequestReads | None]:
        """A stream for `call`, and the request values that it holds for; None if it holds for all."""
        found = self._planned_for(call)
        if found is None and self._key(call) not in self.failures and not self._is_restless(self._key(call).model):
            found = self._add_plan(call)
        if found is None:
            self._ran_eagerly = True
            return self._reference.new_stream(call), None
        return found.new_stream(), found.plan.captured.reads

    def _planned_for(self, call: Call) -> PlanRuntime | None:
        """The plan for the signature of `call` and for what the model reads of its request, or None."""
        key = self._key(call)
        if key in self.cache:
            return self.cache[key]
        for held, runtime in self.plans.items():
            if held.signature.request_values and held.without_reads() == key:
                reads = runtime.plan.captured.reads
                if reads is not None and reads.hold(call.leaves):
                    return self.cache[held]
        return None

    def saved(self) -> list[dict[str, Any]]:
        """All plans for the model's current state, as plain JSON values.

        Raises:
            PlanFileError: a plan cannot be expressed so, or the model has changed since they were made.
        """
        facts = self.watch.look().facts
        fitting = {key: runtime for key, runtime in self.plans.items() if key.model is facts}
        if self.plans and not fitting:
            raise PlanFileError(
                f"the plans are of the model as it was: {self.watch.difference}. Run it once more, then save"
            )
        model, changes = ModelFacts.of(self._model), Changes()
        with changes, changes:
            keep_torch_state(changes)
            return [
                plan_record.encode(runtime.plan, key.signature, runtime.roles, model)
                for key, runtime in fitting.items()
            ]

    def restore(self, records: Iterable[Any]) -> None:
        """Add plans that `saved` returned, for a model in the same state as then.

        Args:
            records: the plans, from a file that anyone may have written.

        Raises:
            CaptureError: the model is in a state that no plan can stand for.
            PlanFileError: the records are not what `saved` returned.
            RegionError: Inductor cannot compile a region.
        """
        check_capturable(self._model)
        facts = self.watch.look().facts
        model = ModelFacts.of(self._model)
        for number, record in enumerate(records):
            started, place, changes = time.perf_counter(), f"plans[{number}]", Changes()
            with changes, changes:
                keep_torch_state(changes)
                plan, signature, leaf_roles = plan_record.decode(record, self._schedule, model, place)
            key = PlanKey(signature, facts)
            if key in self.cache:
                raise PlanFileError(f"{place}: a second plan for calls of {signature}")
            self.cache.add(key, plan, self.watch.live_tensors, leaf_roles, started=started, loaded=True)

    def _add_plan(self, call: Call) -> PlanRuntime | None:
        started = time.perf_counter()
        name = type(self._model).__name__
        check_sites(self._model, self._schedule.sites)  # modules may have been removed since it was compiled
        try:
            captured = capture(self._model, call, self._schedule.sites)
        except CaptureError as error:
            # What the user can fix at once is raised, rather than running slowly because of it.
            if self.options.strict or error.failure.obstacle in (Obstacle.TRAINING, Obstacle.SITE):
                raise
            self.failures = {key: failure for key, failure in self.failures.items() if self.watch.knows(key.model)}
            self.failures[self._key(call)] = error.failure
            message = f"{name} runs without a compiled plan, eagerly with the same schedule. {error.failure}"
            log.warning("%s", message)
            warnings.warn(message, FallbackWarning, stacklevel=2)
            return None
        self.watch.accept()  # a model may build tables when it first runs
        key = self._key(call)
        if captured.reads is not None:
            key = key._replace(signature=dataclasses.replace(key.signature, request_values=captured.reads.key))
        plan = build_plan(captured, self._schedule)
        return self.cache.add(key, plan, self.watch.live_tensors, roles(call), started=started)

    def _key(self, call: Call) -> PlanKey:
        """The key that a plan for this call is kept under."""
        state = self._state or self.state(call)
        return PlanKey(call.signature, state.facts)

    def _is_restless(self, facts: Facts | None) -> bool:
        """Whether the model changed so often in this run that a plan for its current state would not pay."""
        if facts is None or facts in self._new or any(key.model is facts for key in self.plans):
            return False
        name, change = type(self._model).__name__, self._change
        self._change = None
        if len(self._new) == NEW_STATES:
            said, self._said_restless = self._said_restless, True
            if said:
                return True
            log.warning(
                "%s changed more than %d times in this run (last: %s): where it is what no plan was made for, it runs "
                "eagerly and reuses nothing. Keep what changes in every step out of the model, or pass it as a "
                "tensor argument",
                *(name, NEW_STATES - 1, change),
            )
            return True
        self._new.append(facts)
        if change is not None:
            log.warning("%s was captured again: %s", name, change)
        return False
