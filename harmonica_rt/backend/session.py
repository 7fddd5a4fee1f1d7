"""The runs of a torch.compile'd model: its options, the plans behind its graphs, and its current step."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harmonica_rt.arguments import check_schedule
from harmonica_rt.call.call import Call, Signature
from harmonica_rt.call.roles import roles
from harmonica_rt.capture.dynamo import GraphCall
from harmonica_rt.changes import Changes
from harmonica_rt.engine import RunKey, Stream
from harmonica_rt.errors import ArgumentError, HarmonicaError
from harmonica_rt.execute.cuda_graphs import graphs_of
from harmonica_rt.execute.plan_cache import PlanKey, Plans
from harmonica_rt.model.tensors import TensorNote, same_objects
from harmonica_rt.model.watch import KNOWN_STATES
from harmonica_rt.options import CompileOptions
from harmonica_rt.pipelines.fit import warn_about_sampler
from harmonica_rt.plan.plan import build_plan
from harmonica_rt.report import Report
from harmonica_rt.sampling.finding import FindsItsPipeline
from harmonica_rt.sampling.scheduler import listener_of
from harmonica_rt.sampling.session import Session
from harmonica_rt.schedule import Schedule
from harmonica_rt.untrusted.text import described
from harmonica_rt.wrappers import unwrapped

NAME = "harmonica"


@dataclass(frozen=True)
class BackendOptions:
    """The `options` given to `torch.compile`: the schedule, and the options that `harmonica_rt.compile` takes."""

    schedule: Schedule
    plans: CompileOptions

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> BackendOptions:
        """Check the given options.

        Raises:
            ArgumentError: the schedule is missing or not a schedule, a lowering or graph mode is unknown, or an option
                has the wrong type.
            HarmonicaError: an option is unknown.
        """
        given = {} if given is None else given
        example = f'torch.compile(model, backend="{NAME}", options={{"schedule": schedule}})'
        if not isinstance(given, Mapping):
            raise ArgumentError(f"backend {NAME!r} takes its options as a dict, got {described(given)}: {example}")
        names = ("schedule", *(field.name for field in dataclasses.fields(CompileOptions) if field.name != "strict"))
        unknown = [name for name in given if name not in names]
        if unknown:
            raise HarmonicaError(f"backend {NAME!r} has no option {unknown[0]!r}; it has {', '.join(names)}")
        if "schedule" not in given:
            raise ArgumentError(f"backend {NAME!r} needs a harmonica_rt.Schedule: {example}")
        rest = {**given}
        schedule = rest.pop("schedule")
        check_schedule(schedule)
        return cls(schedule, CompileOptions(**rest))


class GraphSession(FindsItsPipeline):
    """The runs of one torch.compile'd model: `reset()` begins the next run, `report()` shows what the last one did."""

    engine: GraphEngine
    undone_by = "harmonica_rt.attach(pipe.transformer).detach()"

    def __init__(self, model: nn.Module, options: BackendOptions) -> None:
        name = type(model).__name__
        self._model = weakref.ref(model)  # a session is freed with its model
        self._alone = False  # whether it was told to follow no pipeline
        super().__init__(name, options.schedule, GraphEngine(name, options))

    def attach(self, pipeline: Any) -> None:
        """See `Session.attach`; replaces another session of this backend that follows the pipeline."""
        before = listener_of(pipeline.scheduler)
        if isinstance(before, GraphSession) and before is not self:
            before.leave(pipeline)
            if not before.pipelines:
                Session.detach(before)
        self._alone = False
        super().attach(pipeline)

    def detach(self) -> None:
        """See `Session.detach`; from now on a pipeline is followed only if it is attached."""
        self._alone = True
        super().detach()

    def _is_me(self, value: object) -> bool:
        free = not self._alone and not self._following
        return free and isinstance(value, nn.Module) and unwrapped(value) is self._model()

    def _follow(self, pipeline: Any) -> None:
        warn_about_sampler(pipeline, self.schedule)
        self.attach(pipeline)

    def call(self, call: GraphCall) -> Any:
        """Run the plan in place of the graph; returns what the graph would return.

        Raises:
            RunError, ScheduleMismatchError, ConcurrentRunError, CaptureError: as for a call of `CompiledModel`.
        """
        if self._turns.mine:  # within another call of this session
            return call.graph.module(*call.values)
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            return self._call(call, lambda: call.graph.module(*call.values))

    def report(self) -> Report:
        """What is computed, reused, stored and saved; prints as a table."""
        return Report.of(self._model_name, self.schedule, self.engine.plans, self.stats)


class GraphEngine:
    """The plans of one model's dynamo graphs, one per signature of their calls. See `Engine`."""

    looks_late = False

    def __init__(self, model_name: str, options: BackendOptions) -> None:
        self.plans = Plans(model_name, options.plans, graphs_of(options.plans.graphs))
        self._schedule = options.schedule
        self._weights: dict[PlanKey, _Weights] = {}
        self._states: dict[Signature, list[TensorNote]] = {}  # states seen in this run, the latest last

    def state(self, call: Call) -> object:
        """See `Engine.state`. Dynamo guards what its graphs assume, but passes the weights with each call."""
        graph_call = _graph_call(call)
        tensors = list(graph_call.weights().values())
        known = self._states.setdefault(call.signature, [])
        if known and known[-1].is_of(tensors) and known[-1].hold():
            return known[-1]
        state = next((note for note in known if note.is_of(tensors) and note.hold()), None) or TensorNote(tensors)
        self._states[call.signature] = [*(note for note in known if note is not state), state][-KNOWN_STATES:]
        if (weights := self._weights.get(PlanKey(call.signature))) is not None:
            weights.renew(graph_call)
        return state

    def begin_run(self, key: RunKey | None = None) -> None:
        """See `Engine.begin_run`. Forgets the states of earlier runs, of which no stream is left."""
        self._states.clear()
        self.plans.begin_run(key)

    def new_stream(self, call: Call) -> Stream:
        """See `Engine.new_stream`."""
        graph_call, key = _graph_call(call), PlanKey(call.signature)
        weights = self._weights.setdefault(key, _Weights())
        weights.renew(graph_call)
        if key not in self.plans:
            started = time.perf_counter()
            plan = build_plan(graph_call.graph.capture(graph_call), self._schedule)
            self.plans.add(key, plan, weights, roles(call), started=started)
            self._weights = {kept: self._weights[kept] for kept in self.plans.held}
            self._states = {held.signature: self._states.get(held.signature, []) for held in self.plans.held}
        return self.plans[key].new_stream()


class _Weights:
    """The weights of a plan: those passed with its last call."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def renew(self, call: GraphCall) -> None:
        """Take the weights of a call; the mapping object stays the same if the tensors do."""
        came = call.weights()
        if not same_objects(came.values(), self._held.values()):
            self._held = came

    def __call__(self) -> dict[str, torch.Tensor]:
        return self._held


def _graph_call(call: Call) -> GraphCall:
    if not isinstance(call, GraphCall):
        raise TypeError(f"expected the call of a dynamo graph, got a {type(call).__name__}")
    return call
