"""The runs of a torch.compile'd model: what was asked for, the plans behind its graphs, and which step it is in."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harmonica_rt.capture.call import Call, Signature
from harmonica_rt.capture.dynamo import GraphCall
from harmonica_rt.capture.roles import roles
from harmonica_rt.changes import Changes
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.fit import check_lowering
from harmonica_rt.lower import DEFAULT as DEFAULT_LOWERING
from harmonica_rt.plan.plan import build_plan
from harmonica_rt.report import Report
from harmonica_rt.runtime.engine import RunKey, Stream
from harmonica_rt.runtime.graphs import graphs_of
from harmonica_rt.runtime.plans import Plans
from harmonica_rt.runtime.session import Session
from harmonica_rt.schedule import Schedule

NAME = "harmonica"
MAX_PLANS = 8  # of one session; the one unused longest goes first


@dataclass(frozen=True)
class Options:
    """What `torch.compile` is given as `options`.

    Attributes:
        schedule: which sites to compute and which to reuse in each step.
        lowering: see `harmonica_rt.compile`.
        graphs: see `harmonica_rt.compile`.
        debug: see `harmonica_rt.compile`.
    """

    schedule: Schedule
    lowering: str = DEFAULT_LOWERING
    graphs: str = "auto"
    debug: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Check what was given.

        Raises:
            HarmonicaError: no schedule or something else in its place, an unknown option, lowering or graph mode.
        """
        given = given or {}
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise HarmonicaError(f"backend {NAME!r} has no option {unknown[0]!r}; it has {', '.join(names)}")
        schedule = given.get("schedule")
        if not isinstance(schedule, Schedule):
            came = f"a {type(schedule).__name__}" if "schedule" in given else "none"
            raise HarmonicaError(
                f"backend {NAME!r} needs a harmonica_rt.Schedule, {came} came: "
                f'torch.compile(model, backend="{NAME}", options={{"schedule": schedule}})'
            )
        options = cls(**given)
        check_lowering(options.lowering)
        graphs_of(options.graphs)
        return options


class GraphSession(Session):
    """The runs of one torch.compile'd model: `reset()` begins the next one, `report()` tells what the last one did."""

    engine: GraphEngine

    def __init__(self, model_name: str, options: Options) -> None:
        super().__init__(model_name, options.schedule, GraphEngine(model_name, options))

    def call(self, call: GraphCall) -> Any:
        """Run the plan in the place of the graph; what the graph would return.

        Raises:
            RunError, ScheduleMismatchError, ConcurrentRunError, CaptureError: as a call of `CompiledModel`.
        """
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            return self._call(call, lambda: call.graph.module(*call.values))

    def report(self) -> Report:
        """What is computed, reused, stored and saved; prints as a table."""
        return Report.of(self._model_name, self.schedule, self.engine.plans, self.stats)


class GraphEngine:
    """Plans of one model's dynamo graphs, one for each signature of their calls. See `Engine`."""

    def __init__(self, model_name: str, options: Options) -> None:
        graphs = graphs_of(options.graphs)
        self.plans = Plans(model_name, lowering=options.lowering, graphs=graphs, debug=options.debug, limit=MAX_PLANS)
        self._schedule = options.schedule
        self._weights: dict[Signature, _Weights] = {}

    def begin_run(self, key: RunKey | None = None) -> None:
        """See `Engine.begin_run`."""
        self.plans.begin_run(key)

    def new_stream(self, call: Call) -> Stream:
        """See `Engine.new_stream`."""
        if not isinstance(call, GraphCall):
            raise TypeError(f"expected the call of a dynamo graph, got a {type(call).__name__}")
        signature = call.signature
        weights = self._weights.setdefault(signature, _Weights(call))
        weights.call = call
        if signature not in self.plans:
            started = time.perf_counter()
            plan = build_plan(call.graph.capture(call), self._schedule)
            self.plans.add(signature, plan, weights, roles(call), started=started)
            self._weights = {kept: self._weights[kept] for kept in self.plans.held}
        return self.plans[signature].new_stream()


class _Weights:
    """The weights of a plan: those that came with the first call of its last stream, and so with the first of a run."""

    def __init__(self, call: GraphCall) -> None:
        self.call = call

    def __call__(self) -> dict[str, torch.Tensor]:
        return self.call.weights()
