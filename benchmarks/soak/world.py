"""One world, run by run on both sides: the plain pipeline under the oracle, and the compiled one."""

from __future__ import annotations

import functools
import gc
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch._dynamo as dynamo

import harmonica_rt as hrt
from benchmarks.soak.oracle import Oracle
from benchmarks.soak.runs import Run, World
from benchmarks.soak.subjects import SUBJECTS, Controls, evaluations
from harmonica_rt.backend import harmonica
from harmonica_rt.errors import HarmonicaError, Obstacle, PlanFileError
from harmonica_rt.pipelines.install import installed

HOOKED = Obstacle.HOOKS.value  # documented: such a model runs eagerly
ROUNDING = 1e-4  # of the largest value; a wrong image is off by 1e-3 and more
ROUNDINGS = 8  # in one call of a model, as against the one that `Oracle.rounds_otherwise` makes of its result


class Interrupted(Exception):
    """Raised by a callback on purpose."""


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        latents: after each step.
        result: the images; None where the run was interrupted.
        outside: outputs and gradients of calls from outside the run.
        interrupted: whether a callback raised.
        counts: calls, reused entries and steps computed in full; None where not known.
        fallbacks: why calls ran eagerly.
    """

    latents: list[torch.Tensor] = field(default_factory=list)
    result: torch.Tensor | None = None
    outside: list[torch.Tensor] = field(default_factory=list)
    interrupted: bool = False
    counts: tuple[int, int, tuple[int, ...]] | None = None
    fallbacks: tuple[str, ...] = ()


class Side:
    """A pipeline, and the values of the changes that are in force on its denoiser."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.subject = SUBJECTS[world.subject]
        self.pipeline = self.subject.build(world.seed, world.variant, world.sampler)
        self._values: dict[str, int] = {}
        made = {event.name for run in world.runs for event in run.events if event.kind == "change"}
        self._shared = {name for name in made if self.subject.changes[name].shared}
        for name in sorted({*made, *(name for run in world.runs for name, _ in run.state)} - self._shared):
            change = self.subject.changes[name]
            for value in (
                *range(1, change.values),
                0,
            ):  # what it keeps is made now, of the weights that both sides have
                change.set(self.pipeline, value)
        self._parameters = {name: p.detach().clone() for name, p in self.pipeline.transformer.named_parameters()}
        self._weights = 0

    def state(self) -> Hashable:
        """What the forward of the denoiser depends on, besides the values of its weights."""
        changes = self.subject.changes
        return tuple(sorted((n, v) for n, v in self._values.items() if v and not changes[n].around))

    def set(self, name: str, value: int) -> None:
        """Bring one change to a value."""
        change = self.subject.changes[name]
        if change.shared or self._values.get(name, 0) != value:
            change.set(self.pipeline, value)
        self._values[name] = value

    def prepare(self, run: Run) -> None:
        """The state in which the run begins; the other side may have left classes and modules changed."""
        wanted = dict(run.state)
        for name in sorted({*self._values, *wanted, *self._shared}):
            self.set(name, wanted.get(name, 0))
        if run.weights != self._weights:
            self._weights = run.weights
            with torch.no_grad():
                for name, parameter in self.pipeline.transformer.named_parameters():
                    if name in self._parameters:
                        parameter.copy_(self._parameters[name] * (1.0, 0.8, 1.1)[run.weights])

    def restore(self) -> None:
        """Undo every change, also to classes and modules."""
        for name in self._values:
            self.set(name, 0)

    def another_scheduler(self) -> None:
        """A new object, as `from_config` makes it."""
        scheduler = self.pipeline.scheduler
        self.pipeline.scheduler = type(scheduler).from_config(scheduler.config)

    def before(self, kind: str, run: Run, outcome: Outcome) -> None:
        """What happens right before a run, on this side."""
        if kind == "another scheduler":
            self.another_scheduler()
        elif kind in ("outside", "gradient"):
            outcome.outside += self.call_from_outside(run.seed, with_gradient=kind == "gradient")
        elif kind == "collect":
            gc.collect()

    def sample(self, run: Run) -> Outcome:
        """One run; raises what it raises, but for the exception of its own callback."""
        outcome = Outcome()
        for kind in run.before:
            self.before(kind, run, outcome)

        def on_step_end(index: int, latents: torch.Tensor, controls: Controls) -> None:
            outcome.latents.append(latents.clone())
            for event in run.events:
                if event.after == index:
                    self._happen(event, run, controls, outcome)

        try:
            outcome.result = self.subject.sample(self.pipeline, run, self.world.asked, on_step_end)
        except Interrupted:
            outcome.interrupted = True
        return outcome

    def _happen(self, event: Any, run: Run, controls: Controls, outcome: Outcome) -> None:
        if event.kind == "change":
            self.set(event.name, event.value)
        elif event.kind in ("prompt", "prompt in place"):
            controls.prompt(event.value, in_place=event.kind == "prompt in place")
        elif event.kind == "guidance":
            if run.guided:
                controls.guidance_off()
        elif event.kind == "raise":
            raise Interrupted
        elif event.kind == "stop":
            controls.stop()
        elif event.kind == "collect":
            gc.collect()
        else:
            seed = run.seed + event.after + 1
            outcome.outside += self.call_from_outside(seed, with_gradient=event.kind == "gradient")

    def call_from_outside(self, seed: int, *, with_gradient: bool) -> list[torch.Tensor]:
        """A call that belongs to no run: its output, and the gradients of its latents and of one weight."""
        call = self.subject.arguments(self.pipeline, seed)
        model = self.pipeline.transformer
        with torch.set_grad_enabled(with_gradient):
            latents = call["hidden_states"].requires_grad_(with_gradient)
            weight = next(p for p in model.parameters() if p.requires_grad)
            output = _tensor(model(**call))
            if not with_gradient:
                return [output.clone()]
            if not output.requires_grad:  # cut off: a gradient of zero in its place differs from the right one
                return [output, torch.zeros_like(latents), torch.zeros_like(weight)]
            grads = torch.autograd.grad(output.square().sum(), [latents, weight])
        return [output.detach(), *grads]


class Plain(Side):
    """The plain pipeline, under the oracle."""

    def __init__(self, world: World, schedule: Any) -> None:
        super().__init__(world)
        self.oracle = Oracle(schedule, self.state)
        self._asked = False

    def sample(self, run: Run) -> Outcome:
        """One run under the schedule."""
        outcome = Outcome()
        for kind in run.before:
            self.before(kind, run, outcome)
        self.oracle.begin(run.first)
        alone = replace(run, before=())
        with self.oracle.watching(self.pipeline.transformer), self.oracle.counting(self.pipeline.scheduler):
            found = super().sample(alone)
        found.outside = outcome.outside + found.outside
        oracle = self.oracle
        found.counts = (oracle.calls, oracle.reused, tuple(oracle.computed_in_full))
        return found

    def call_from_outside(self, seed: int, *, with_gradient: bool) -> list[torch.Tensor]:
        """The plain model, out of the oracle's sight."""
        with self.oracle.aside():
            return super().call_from_outside(seed, with_gradient=with_gradient)


class Compiled(Side):
    """The compiled pipeline."""

    def __init__(self, world: World, schedule: Any) -> None:
        super().__init__(world)
        self.schedule = schedule
        self._interrupted = self.after_interruption = False
        self.install()

    def install(self) -> None:
        """Compile it through the world's door."""
        world, pipeline = self.world, self.pipeline
        how: dict[str, Any] = {"lowering": world.lowering}
        if world.door == "reference":
            hrt.reference(pipeline, self.schedule)
        elif world.door == "torch.compile":
            if "harmonica" not in dynamo.list_backends():  # of a checkout that was not installed
                dynamo.register_backend(harmonica, name="harmonica")
            dynamo.config.recompile_limit = 64  # a model that changes all the time is made in as many graphs
            options = {"schedule": self.schedule, **how}
            pipeline.transformer.compile(backend="harmonica", options=options, fullgraph=True)
            hrt.attach(pipeline)
        elif world.door == "model":
            pipeline.denoiser = hrt.compile(pipeline.transformer, self.schedule, **how)
        else:
            hrt.compile(pipeline, self.schedule, debug=world.variant % 4 == 0, max_plans=world.variant + 2, **how)

    @property
    def session(self) -> Any:
        """What reports on the runs; None where nothing does."""
        if self.world.door == "compile":
            return hrt.get_compiled(self.pipeline)
        if self.world.door == "model":
            return self.pipeline.denoiser
        return hrt.attach(self.pipeline.transformer) if self.world.door == "torch.compile" else None

    def before(self, kind: str, run: Run, outcome: Outcome) -> None:
        """What happens right before a run; saving and compiling again are of this side alone."""
        if kind == "compile again":
            if self.world.door != "torch.compile":
                if self.world.door != "model":
                    hrt.uncompile(self.pipeline)
                self.install()
        elif kind == "save and load":
            if self.world.door in ("compile", "model"):
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
                return  # as documented: of the model as it was before the last change
            if self.world.door == "model":
                self.pipeline.denoiser = hrt.load(path, self.pipeline.transformer)
            else:
                hrt.uncompile(self.pipeline)
                hrt.load(path, self.pipeline)

    def sample(self, run: Run) -> Outcome:
        """One run of the compiled pipeline; it is compiled again where the last run was interrupted in between."""
        if self._interrupted and self.world.door == "compile" and installed(self.pipeline.transformer) is None:
            self.install()
        self.after_interruption, self._interrupted = self._interrupted, True
        with interrupted_at_line(run.interrupted_at):
            outcome = super().sample(run)
        self._interrupted = False
        if self.session is None:
            return outcome
        report = self.session.report()
        entries = report.last_calls * len(self.schedule.sites)
        outcome.counts = (report.last_calls, round((report.last_cur or 0.0) * entries), tuple(report.last_catch_ups))
        outcome.fallbacks = tuple(report.fallbacks)
        return outcome


@contextmanager
def interrupted_at_line(count: int) -> Iterator[None]:
    """Within this block Ctrl-C comes at the `count`-th line of the package that runs in this thread; 0 for never."""
    if count == 0:
        yield
        return
    root = os.path.dirname(hrt.__file__)
    left = count

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(root):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Pair:
    """Both sides of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.schedule = random_schedule(world)
        self.plain, self.compiled = Plain(world, self.schedule), Compiled(world, self.schedule)

    def fault(self, run: Run) -> str | None:
        """Run it on both sides; what is wrong with the compiled one, None where nothing is."""
        found = given_or_raised(lambda: self.got(run))
        what = self.judged(self.expected(run), found, run)
        if what is None or self.world.door != "torch.compile":
            return what
        # as documented: dynamo makes graphs as it sees fit, and the first step in another one is computed in full
        try:
            counts = found().counts
        except Exception:  # it is in `what` already
            return what
        self.plain.oracle.in_full = Counter(counts[2] if counts is not None else ())
        try:
            return self.judged(self.expected(run), found, run)
        finally:
            self.plain.oracle.in_full = Counter()

    def expected(self, run: Run) -> Outcome:
        """What the oracle gives."""
        self.plain.prepare(run)
        return self.plain.sample(run)

    def got(self, run: Run) -> Outcome:
        """What the compiled pipeline gives."""
        self.compiled.prepare(run)
        return self.compiled.sample(run)

    def judged(self, expected: Outcome, got: Callable[[], Outcome], run: Run) -> str | None:
        """What is wrong with what `got` gives or raises."""
        try:
            return self.difference(expected, got(), run)
        except KeyboardInterrupt:
            if run.interrupted_at:
                return None  # what it left behind, the next run tells
            raise
        except HarmonicaError as error:
            # A call from outside looks like the first of a run that was interrupted before its scheduler was seen.
            unseen = self.compiled.after_interruption and "requires a gradient" in str(error)
            if run.interrupted_at or unseen:
                return None
            return f"refused: {type(error).__name__}: {error}"
        except Exception as error:
            # as documented: behind torch.compile there is no eager fallback, and dynamo's error carries ours
            hooked = HOOKED in str(error) or "a forward hook on the model" in str(error)
            if run.interrupted_at or (self.world.door == "torch.compile" and hooked):
                return None
            return f"undocumented error: {type(error).__name__}: {error}"

    def difference(self, expected: Outcome, got: Outcome, run: Run) -> str | None:
        """What is wrong with `got`."""
        for index, (a, b) in enumerate(zip(expected.latents, got.latents, strict=False)):
            if not self.same(a, b) and not self._is_rounding(run, index, a, b):
                return f"wrong image: after step {index}, {_distance(a, b)}, {_counted(expected, got)}"
        if len(expected.latents) != len(got.latents) or expected.interrupted != got.interrupted:
            return f"wrong image: {len(got.latents)} steps in the place of {len(expected.latents)}"
        if expected.result is not None and got.result is not None and not self.same(expected.result, got.result):
            return f"wrong image: the last one, {_distance(expected.result, got.result)}"
        for index, (a, b) in enumerate(zip(expected.outside, got.outside, strict=True)):
            if not self.same(a, b):
                return f"wrong call from outside: value {index}, {_distance(a, b)}"
        disturbed = expected.interrupted or any(event.kind in ("outside", "gradient") for event in run.events)
        if not disturbed and got.counts is not None and got.counts != expected.counts:
            return f"other entries reused: {_counted(expected, got)}"
        unexpected = [why for why in got.fallbacks if HOOKED not in why]
        return f"not compiled: {unexpected[0]}" if unexpected else None

    def _is_rounding(self, run: Run, index: int, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether a run that rounds each call's result otherwise gets as far from the oracle: guidance amplifies."""
        if self.world.lowering == "plain":
            return False
        self.plain.oracle.rounds_otherwise = True
        try:
            other = self.expected(run).latents[index]
        finally:
            self.plain.oracle.rounds_otherwise = False
        return a.shape == b.shape and bool((a - b).abs().max() <= ROUNDINGS * (a - other).abs().max())

    def same(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Equal bits, or up to rounding where the lowering rounds."""
        if self.world.lowering == "plain":
            return torch.equal(a, b)
        return a.shape == b.shape and bool((a - b).abs().max() <= ROUNDING * a.abs().max().clamp(min=1e-3))

    def close(self) -> None:
        """Undo what the world did to classes and modules."""
        self.plain.restore()
        self.compiled.restore()
        if self.world.door == "torch.compile":
            dynamo.reset()


def random_schedule(world: World) -> Any:
    """From the world's seed: a period, or a random mask."""
    model = SUBJECTS[world.subject].build(world.seed, world.variant, world.sampler).transformer
    sites, steps = hrt.find_sites(model), evaluations(world.sampler, world.asked)
    draw = np.random.default_rng(world.seed)
    if draw.random() < 0.3:
        return hrt.Schedule.every(int(draw.integers(2, 5)), steps=steps, sites=sites)
    mask = draw.random((steps, len(sites))) < draw.choice([0.2, 0.5, 0.8])
    mask[0] = True
    return hrt.Schedule.from_array(mask, sites=sites)


def given_or_raised(sample: Callable[[], Outcome]) -> Callable[[], Outcome]:
    """Call `sample` now; the result gives what it gave, or raises what it raised."""
    try:
        outcome = sample()
    except BaseException as error:
        return functools.partial(_raise, error)
    return lambda: outcome


def _raise(error: BaseException) -> Outcome:
    raise error


def _tensor(output: Any) -> torch.Tensor:
    found: torch.Tensor = output.sample if hasattr(output, "sample") else output
    return found


def _distance(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape:
        return f"{list(b.shape)} in the place of {list(a.shape)}"
    return f"{float((a - b).abs().max() / a.abs().max()):.1e} off"


def _counted(expected: Outcome, got: Outcome) -> str:
    return f"(calls, reused entries, steps in full) {got.counts} in the place of {expected.counts}"
