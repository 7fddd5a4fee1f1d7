"""The compiled side of a world: runs the compiled pipeline, which is compared with the plain side."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch._dynamo as dynamo

import harmonica_rt as hrt
from benchmarks.soak.ctrl_c import ctrl_c_after
from benchmarks.soak.oracle import Counts
from benchmarks.soak.outcome import Outcome
from benchmarks.soak.side import Side
from benchmarks.soak.world import Run, World
from harmonica_rt.backend import harmonica
from harmonica_rt.errors import PlanFileError
from harmonica_rt.pipelines.install import installed


class Compiled(Side):
    """The compiled pipeline.

    Attributes:
        after_interruption: True if the run before the current one did not end.
    """

    def __init__(self, world: World, schedule: Any) -> None:
        super().__init__(world)
        self.schedule = schedule
        self._interrupted = self.after_interruption = False
        self.install()

    def install(self) -> None:
        """Compile the pipeline through the world's interface."""
        world, pipeline = self.world, self.pipeline
        how: dict[str, Any] = {"lowering": world.lowering}
        if world.interface == "reference":
            hrt.reference(pipeline, self.schedule)
        elif world.interface == "torch.compile":
            if "harmonica" not in dynamo.list_backends():  # true of a checkout that was not installed
                dynamo.register_backend(harmonica, name="harmonica")
            dynamo.config.recompile_limit = 64  # each change of the model needs another graph
            options = {"schedule": self.schedule, **how}
            pipeline.transformer.compile(backend="harmonica", options=options, fullgraph=True)
            hrt.attach(pipeline)
        elif world.interface == "model":
            pipeline.denoiser = hrt.compile(pipeline.transformer, self.schedule, **how)
        else:
            hrt.compile(pipeline, self.schedule, debug=world.variant % 4 == 0, max_plans=world.variant + 2, **how)

    @property
    def session(self) -> Any:
        """The object that reports on runs; None for the reference engine."""
        if self.world.interface == "compile":
            return hrt.get_compiled(self.pipeline)
        if self.world.interface == "model":
            return self.pipeline.denoiser
        return hrt.attach(self.pipeline.transformer) if self.world.interface == "torch.compile" else None

    def before(self, kind: str, run: Run, outcome: Outcome) -> None:
        """Do what happens right before a run; saving and compiling again happen on this side only."""
        if kind == "compile again":
            if self.world.interface != "torch.compile":
                if self.world.interface != "model":
                    hrt.uncompile(self.pipeline)
                self.install()
        elif kind == "save and load":
            if self.world.interface in ("compile", "model"):
                self._save_and_load()
        else:
            super().before(kind, run, outcome)

    def _save_and_load(self) -> None:
        compiled = self.session
        if not compiled.report().plans:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "plan.json")
            try:
                compiled.save(path)
            except PlanFileError:
                return  # documented: the plan is for the model before its last change
            if self.world.interface == "model":
                self.pipeline.denoiser = hrt.load(path, self.pipeline.transformer)
            else:
                hrt.uncompile(self.pipeline)
                hrt.load(path, self.pipeline)

    def sample(self, run: Run) -> Outcome:
        """Sample one run; the pipeline is compiled again first if an interruption left it uncompiled."""
        if self._interrupted and self.world.interface == "compile" and installed(self.pipeline.transformer) is None:
            self.install()
        self.after_interruption, self._interrupted = self._interrupted, True
        with ctrl_c_after(run.interrupted_at):
            outcome = super().sample(run)
        self._interrupted = False
        if self.session is None:
            return outcome
        report = self.session.report()
        entries = report.last_calls * len(self.schedule.sites)
        reused = round((report.last_cur or 0.0) * entries)
        outcome.counts = Counts(report.last_calls, reused, tuple(report.last_catch_ups))
        outcome.fallbacks = tuple(report.fallbacks)
        return outcome
