"""A run under a schedule written with forward hooks, which share nothing with the package: an independent truth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.options import EXACT
from harmonica_rt.report import Report
from tests.tiny import sample


class Truth:
    """Runs a plain pipeline under a schedule with forward hooks.

    Features are kept per prompt and per set of arguments given. A call reuses nothing unless everything that it would
    reuse is there, stored in the step that the schedule names or later. The run begins at step `first`.
    """

    def __init__(self, pipeline: Any, schedule: Schedule, first: int = 0) -> None:
        self._pipeline = pipeline
        self._schedule = schedule
        self._step = first
        self._features: dict[Any, dict[str, tuple[int, Any]]] = {}
        self._held: dict[str, tuple[int, Any]] = {}
        self._reused: set[str] = set()
        self.computed_in_full: list[int] = []
        self.calls = self.reused = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this block the pipeline samples one run."""
        model, scheduler = self._pipeline.transformer, self._pipeline.scheduler
        original = scheduler.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            self._step += 1
            return original(*args, **kwargs)

        scheduler.step = step
        hooks = [model.register_forward_pre_hook(self._call_begins, with_kwargs=True)]
        for site in self._schedule.sites:
            hook = functools.partial(self._site_ran, site)
            hooks.append(model.get_submodule(site).register_forward_hook(hook))
        try:
            yield
        finally:
            del scheduler.step
            for handle in hooks:
                handle.remove()

    def _call_begins(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        prompt = kwargs["encoder_hidden_states"]
        given = frozenset(name for name, value in kwargs.items() if value is not None)
        self._held = self._features.setdefault((given, tuple(prompt.shape), float(prompt.double().sum())), {})
        rows = self._schedule.compute[: self._step + 1]
        sources = {
            site: int(np.flatnonzero(rows[:, column])[-1])
            for column, site in enumerate(self._schedule.sites)
            if not rows[-1, column]
        }
        fresh = all(site in self._held and self._held[site][0] >= source for site, source in sources.items())
        self._reused = set(sources) if fresh else set()
        self.calls += 1
        self.reused += len(self._reused)
        if not fresh:
            self.computed_in_full.append(self._step)

    def _site_ran(self, site: str, module: Any, args: Any, output: Any) -> Any:
        if site in self._reused:
            return self._held[site][1]
        kept = tuple(o.clone() for o in output) if isinstance(output, tuple) else output.clone()
        self._held[site] = (self._step, kept)
        return None


@dataclass(frozen=True)
class Pair:
    """Two pipelines with the same parameters: one plain, one compiled once for all tests."""

    plain: Any
    compiled: Any
    schedule: Schedule
    lowering: str

    def same(self, got: NDArray[Any], expected: NDArray[Any]) -> bool:
        """Equal bit for bit, or up to the rounding of a few steps where the lowering rounds otherwise."""
        if self.lowering in EXACT:
            return np.array_equal(got, expected)
        return got.shape == expected.shape and bool(np.abs(got - expected).max() < 1e-5 * np.abs(expected).max())

    def run(
        self, call: dict[str, Any], *, asked: int | None = None, first: int = 0
    ) -> tuple[Truth, NDArray[Any], NDArray[Any], Report]:
        """The truth and its images, the compiled pipeline's images and report.

        Args:
            call: arguments of the pipelines.
            asked: `num_inference_steps`, where it is not the number of steps of the schedule.
            first: the step of the schedule that the run begins with.
        """
        steps = self.schedule.steps if asked is None else asked
        truth = Truth(self.plain, self.schedule, first)
        with truth.running():
            expected = _seeded_sample(self.plain, steps, **call)
        got = _seeded_sample(self.compiled, steps, **call)
        return truth, expected, got, hrt.get_compiled(self.compiled).report()

    def check(self, call: dict[str, Any], *, asked: int | None = None, first: int = 0) -> Report:
        """Check that images and what was reused are the truth's, and that something was reused."""
        truth, expected, got, report = self.run(call, asked=asked, first=first)
        assert self.same(got, expected)
        assert list(report.last_catch_ups) == truth.computed_in_full
        assert report.last_calls == truth.calls
        assert report.last_first == first
        assert report.last_cur == pytest.approx(truth.reused / (truth.calls * len(self.schedule.sites)))
        assert report.cached
        assert truth.reused > 0
        assert report.fallbacks == ()
        return report


def pair(build: Callable[[], Any], schedule_for: Callable[[Any], Schedule], lowering: str) -> Pair:
    """Two pipelines that `build` gives, one of them compiled with the schedule for its denoiser."""
    pipelines = []
    for _ in range(2):
        torch.manual_seed(0)
        pipelines.append(build())
        pipelines[-1].set_progress_bar_config(disable=True)
    plain, compiled = pipelines
    schedule = schedule_for(plain.transformer)
    return Pair(plain, hrt.compile(compiled, schedule, lowering=lowering, strict=True, debug=True), schedule, lowering)


def _seeded_sample(pipeline: Any, steps: int, **call: Any) -> NDArray[Any]:
    """Some pipelines encode images with torch's own generator, not with the one they are given."""
    torch.manual_seed(0)
    return sample(pipeline, steps, **call)
