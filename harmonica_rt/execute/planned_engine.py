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
from harmonica_rt.capture.capture import mark
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.capture.captures import captures_of
from harmonica_rt.changes import Changes
from harmonica_rt.engine import RunKey, Stream
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle, PlanFileError
from harmonica_rt.execute.cuda_graphs import Graphs, graphs_of
from harmonica_rt.execute.model_looks import ModelLooks
from harmonica_rt.execute.plan_cache import PlanKey, Plans
from harmonica_rt.execute.plan_runtime import PlanRuntime
from harmonica_rt.execute.request_value_stream import HeldStream, RequestValueStream
from harmonica_rt.model.refusals import check_capturable
from harmonica_rt.model.watch import ModelState, ModelWatch
from harmonica_rt.options import CompileOptions
from harmonica_rt.plan.plan import build_plan
from harmonica_rt.planfile import plan_record
from harmonica_rt.planfile.model_facts import ModelFacts
from harmonica_rt.reference_engine import ReferenceEngine
from harmonica_rt.schedule import Schedule, ScheduleSet
from harmonica_rt.schedule.sites import check_sites
from harmonica_rt.torch_state import keep_torch_state

log = logging.getLogger(__name__)


class FallbackWarning(UserWarning):
    """A model could not be captured and runs eagerly with the same schedule: same images, less speed."""


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
        self._schedule = schedule  # of the current run
        self._looks = ModelLooks(ModelWatch(model))
        self._captures = captures_of(model)
        self._ran_eagerly = False  # in this run

    @property
    def watch(self) -> ModelWatch:
        """The watch of the model."""
        return self._looks.watch

    @property
    def plans(self) -> dict[PlanKey, PlanRuntime]:
        """The plans in the cache, from the least to the most recently used."""
        return self.cache.held

    @property
    def failures_now(self) -> dict[PlanKey, CaptureFailure]:
        """Why calls run eagerly, for the model as the last call found it."""
        facts = self._looks.facts
        return {key: failure for key, failure in self.failures.items() if key.model is facts}

    @property
    def looks_late(self) -> bool:
        """See `Engine.looks_late`. True on a GPU: its queue is filled before the host checks the model."""
        return not self._ran_eagerly and any(key.signature.device.type == "cuda" for key in self.plans)

    def state(self, call: Call) -> ModelState:
        """See `Engine.state`; plans are made for a state, and kept in case it comes back."""
        return self._looks.look()

    def begin_run(self, key: RunKey | None = None, schedule: Schedule | None = None) -> ModelState | None:
        """See `Engine.begin_run`; parameters are fetched anew."""
        self._schedule = schedule or self._schedule
        self._ran_eagerly = False
        known = self._looks.begin_run(late=self.looks_late)
        self.cache.begin_run(key)
        return known

    def new_stream(self, call: Call) -> Stream:
        """A stream over the plan for the signature of `call`, captured now if there is none."""
        stream, values = self.stream_for(call)
        return stream if values is None else RequestValueStream(self.stream_for, stream, values)

    def stream_for(self, call: Call) -> HeldStream:
        """A stream for `call`, and the request values that it holds for; None if it holds for all."""
        found = self._planned_for(call)
        failed = self._key(call).without_schedule() in self.failures
        if found is None and not failed and self._may_plan(self._key(call)):
            found = self._add_plan(call)
        if found is None:
            self._ran_eagerly = True
            return ReferenceEngine(self._model, self._schedule, self.watch).new_stream(call), None
        return found.new_stream(), found.lowered.plan.captured.request_values

    def _planned_for(self, call: Call) -> PlanRuntime | None:
        """The plan for the signature of `call` and for the values of its request, or None."""
        key = self._key(call)
        if key in self.cache:
            return self.cache[key]
        for held, runtime in self.plans.items():
            if held.signature.request_values and held.without_request_values() == key:
                values = runtime.lowered.plan.captured.request_values
                if values is not None and values.hold(call.leaves):
                    return self.cache[held]
        return None

    def saved(self) -> list[dict[str, Any]]:
        """All plans for the model's current state, as plain JSON values.

        Raises:
            PlanFileError: a plan cannot be expressed as JSON, or the model has changed since all of them were made.
        """
        facts = self.watch.look().facts
        fitting = {key: runtime for key, runtime in self.plans.items() if key.model is facts}
        if self.plans and not fitting:
            raise PlanFileError(
                f"the model has changed since it was planned: {self.watch.difference}. Run it once more, then save"
            )
        model, changes = ModelFacts.of(self._model), Changes()
        with changes, changes:
            keep_torch_state(changes)
            records: list[dict[str, Any]] = []
            plans: list[plan_record.SavedPlan] = []
            for key, runtime in fitting.items():
                plan = plan_record.SavedPlan(runtime.lowered.plan, key.signature, runtime.lowered.roles)
                records.append(plan_record.encode(plan, model, plans))
                plans.append(plan)
            return records

    def restore(self, records: Iterable[Any], schedules: ScheduleSet) -> None:
        """Add plans that `saved` returned, for a model in the same state as then.

        Args:
            records: the plans, from a file that anyone may have written.
            schedules: the schedules of the file, which those of other plans are resampled from.

        Raises:
            CaptureError: the model is in a state that no plan can stand for.
            PlanFileError: the records are not what `saved` returned.
            RegionError: Inductor cannot compile a region.
        """
        check_capturable(self._model)
        facts = self.watch.look().facts
        model = ModelFacts.of(self._model)
        plans: list[plan_record.SavedPlan] = []
        for number, record in enumerate(records):
            started, where, changes = time.perf_counter(), f"plans[{number}]", Changes()
            with changes, changes:
                keep_torch_state(changes)
                found = plan_record.decode(record, schedules, model, plans, where)
            plans.append(found)
            plan, signature, leaf_roles = found
            key = PlanKey(signature, facts, plan.schedule)
            if key in self.cache:
                raise PlanFileError(f"{where}: a second plan for calls of {signature}")
            self.cache.add(key, plan, self.watch.live_tensors, leaf_roles, started=started, loaded=True)

    def _add_plan(self, call: Call) -> PlanRuntime | None:
        started = time.perf_counter()
        name = type(self._model).__name__
        check_sites(self._model, self._schedule.sites)  # modules may have been removed since it was compiled
        try:
            captured = self.cache.captured_before(self._key(call), call.leaves) or self._captured(call)
        except CaptureError as error:
            # What the user can easily fix is raised; running eagerly instead would only be slow.
            if self.options.strict or error.failure.obstacle in (Obstacle.TRAINING, Obstacle.SITE, Obstacle.SPAN):
                raise
            self.failures = {key: failure for key, failure in self.failures.items() if self.watch.knows(key.model)}
            self.failures[self._key(call).without_schedule()] = error.failure
            message = f"{name} runs without a compiled plan, eagerly with the same schedule. {error.failure}"
            log.warning("%s", message)
            warnings.warn(message, FallbackWarning, stacklevel=2)
            return None
        key = self._key(call)
        if captured.request_values is not None:
            key = key._replace(signature=dataclasses.replace(key.signature, request_values=captured.request_values.key))
        plan = build_plan(captured, self._schedule)
        return self.cache.add(key, plan, self.watch.live_tensors, roles(call), started=started)

    def _captured(self, call: Call) -> CapturedGraph:
        """The model captured for the signature of a call, now or for another schedule."""
        captured, kept = self._captures.get(self.watch, self._looks.state, call)
        return mark(self._model, captured, self._schedule.sites, seconds=0.0 if kept else None)

    def _key(self, call: Call) -> PlanKey:
        """The key of a plan for this call."""
        return PlanKey(call.signature, self._looks.state.facts, self._schedule)

    def _may_plan(self, key: PlanKey) -> bool:
        """Whether to plan for the model's current state; False if the model keeps changing in this run."""
        facts = key.model
        if facts is None or any(held.model is facts for held in self.plans):
            return True
        return not self._looks.new_states.is_one_too_many(facts)
