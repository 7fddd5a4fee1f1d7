"""The runs of a torch.compile'd model: which pipeline it follows, and its current step."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from harmonica_rt.backend.backend_options import BackendOptions
from harmonica_rt.backend.graph_engine import GraphEngine
from harmonica_rt.capture.dynamo import GraphCall
from harmonica_rt.changes import Changes
from harmonica_rt.pipelines.fit import warn_about_sampler
from harmonica_rt.report import Report
from harmonica_rt.sampling.finding import FindsItsPipeline
from harmonica_rt.sampling.scheduler import listener_of
from harmonica_rt.sampling.session import Session
from harmonica_rt.wrappers import unwrapped


class GraphSession(FindsItsPipeline):
    """The runs of one torch.compile'd model: `reset()` begins the next run, `report()` shows what the last one did."""

    engine: GraphEngine
    undone_by = "harmonica_rt.attach(pipe.transformer).detach()"

    def __init__(self, model: nn.Module, options: BackendOptions) -> None:
        name = type(model).__name__
        self._model = weakref.ref(model)  # a session is freed with its model
        self._alone = False  # after detach(): only pipelines that are attached are followed
        super().__init__(name, options.schedule, GraphEngine(name, options), options.plans.on_other_steps)

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
