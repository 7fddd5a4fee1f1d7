"""The plans behind the graphs that dynamo makes of one model, as an engine."""

from __future__ import annotations

import time

import torch

from harmonica_rt.backend.backend_options import BackendOptions
from harmonica_rt.call.call import Call, Signature
from harmonica_rt.call.roles import roles
from harmonica_rt.capture.dynamo import GraphCall
from harmonica_rt.engine import RunKey, Stream
from harmonica_rt.execute.cuda_graphs import graphs_of
from harmonica_rt.execute.plan_cache import PlanKey, Plans
from harmonica_rt.model.tensors import TensorNote, same_objects
from harmonica_rt.model.watch import KNOWN_STATES
from harmonica_rt.plan.plan import build_plan
from harmonica_rt.schedule import Schedule, ScheduleSet


class GraphEngine:
    """The plans of one model's dynamo graphs, one per signature of their calls. See `Engine`."""

    looks_late = False

    def __init__(self, model_name: str, options: BackendOptions) -> None:
        self.plans = Plans(model_name, options.plans, graphs_of(options.plans.graphs))
        self._schedule = ScheduleSet.of(options.schedule).schedules[0]
        self._passed: dict[Signature, _PassedTensors] = {}
        self._states: dict[Signature, list[TensorNote]] = {}  # states seen in this run, the latest last

    def state(self, call: Call) -> object:
        """See `Engine.state`. Dynamo guards what its graphs assume, but passes the parameters with each call."""
        graph_call = _graph_call(call)
        tensors = list(graph_call.parameters().values())
        known = self._states.setdefault(call.signature, [])
        if known and known[-1].is_of(tensors) and known[-1].hold():
            return known[-1]
        state = next((note for note in known if note.is_of(tensors) and note.hold()), None) or TensorNote(tensors)
        self._states[call.signature] = [*(note for note in known if note is not state), state][-KNOWN_STATES:]
        if (passed := self._passed.get(call.signature)) is not None:
            passed.renew(graph_call)
        return state

    def begin_run(self, key: RunKey | None = None, schedule: Schedule | None = None) -> None:
        """See `Engine.begin_run`. Forgets the states of earlier runs, of which no stream is left."""
        self._schedule = schedule or self._schedule
        self._states.clear()
        self.plans.begin_run(key)

    def new_stream(self, call: Call) -> Stream:
        """See `Engine.new_stream`."""
        graph_call, key = _graph_call(call), PlanKey(call.signature, schedule=self._schedule)
        passed = self._passed.setdefault(call.signature, _PassedTensors())
        passed.renew(graph_call)
        if key not in self.plans:
            started = time.perf_counter()
            captured = self.plans.captured_before(key, call.leaves) or graph_call.graph.capture(graph_call)
            plan = build_plan(captured, self._schedule)
            self.plans.add(key, plan, passed, roles(call), started=started)
            self._passed = {held.signature: self._passed[held.signature] for held in self.plans.held}
            self._states = {held.signature: self._states.get(held.signature, []) for held in self.plans.held}
        return self.plans[key].new_stream()


class _PassedTensors:
    """The parameters and buffers of a plan: those passed with its last call."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def renew(self, call: GraphCall) -> None:
        """Hold the tensors passed with a call.

        The mapping object stays the same if the tensors do: by that, plans see that they need not fetch them again.
        """
        passed = call.parameters()
        if not same_objects(passed.values(), self._held.values()):
            self._held = passed

    def __call__(self) -> dict[str, torch.Tensor]:
        return self._held


def _graph_call(call: Call) -> GraphCall:
    if not isinstance(call, GraphCall):
        raise TypeError(f"expected the call of a dynamo graph, got a {type(call).__name__}")
    return call
