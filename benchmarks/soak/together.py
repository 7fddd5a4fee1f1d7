"""Several runs at once: threads with a pipeline each, and threads or coroutines that wrongly share one denoiser."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import harmonica_rt as hrt
from benchmarks.soak import toy
from benchmarks.soak.runs import Run
from benchmarks.soak.subjects import loop_request
from benchmarks.soak.world import Outcome, Pair, given_or_raised
from harmonica_rt.errors import HarmonicaError


def in_threads(tasks: Sequence[Callable[[], Outcome]]) -> list[Callable[[], Outcome]]:
    """Run all at once, each in a thread of its own; for each something that gives what it gave or raises its error."""
    found: list[Callable[[], Outcome]] = [lambda: Outcome()] * len(tasks)
    gate = threading.Barrier(len(tasks))

    def work(index: int) -> None:
        gate.wait()
        found[index] = given_or_raised(tasks[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def faults_apart(pairs: Sequence[Pair], runs: Sequence[Run]) -> list[str | None]:
    """One run in each pair, those of the compiled sides at once; what is wrong with each."""
    expected = [pair.expected(run) for pair, run in zip(pairs, runs, strict=True)]
    got = in_threads([partial(pair.got, run) for pair, run in zip(pairs, runs, strict=True)])
    return [pair.judged(*given) for pair, *given in zip(pairs, expected, got, runs, strict=True)]


def faults_shared(pair: Pair, runs: Sequence[Run], draw: random.Random, *, threads: bool) -> list[str | None]:
    """Runs of several pipelines over one denoiser, at once; each gives the right latents or a documented error."""
    expected = [pair.expected(run) for run in runs]
    loops = _loops_over(pair, len(runs))
    if threads:
        rests = [draw.random() * 2e-3 for _ in runs]
        tasks = [partial(_sampled, loop, run, pair, rest) for loop, run, rest in zip(loops, runs, rests, strict=True)]
        got = in_threads(tasks)
    else:
        got = _interleaved([_Coroutine(loop, run, pair) for loop, run in zip(loops, runs, strict=True)], draw)
    return [_fault(pair, *given) for given in zip(expected, got, runs, strict=True)]


def _loops_over(pair: Pair, count: int) -> list[toy.Loop]:
    """The compiled side's pipeline, and others over its denoiser, with schedulers of their own."""
    first = pair.compiled.pipeline
    loops = [first]
    for _ in range(count - 1):
        other = copy.copy(first)
        other.scheduler = type(first.scheduler).from_config(first.scheduler.config)
        loops.append(other)
        if pair.world.door == "compile":
            hrt.compile(other, pair.schedule, lowering=pair.world.lowering)
    return loops


def _sampled(loop: toy.Loop, run: Run, pair: Pair, rest: float) -> Outcome:
    outcome = Outcome()

    def on_step_end(_: int, latents: object) -> None:
        outcome.latents.append(latents.clone())  # type: ignore[attr-defined]
        time.sleep(rest)

    outcome.result = loop(loop_request(run, pair.world.asked), on_step_end)
    return outcome


class _Coroutine:
    """A run that halts after every step."""

    def __init__(self, loop: toy.Loop, run: Run, pair: Pair) -> None:
        self._steps = loop.steps(loop_request(run, pair.world.asked))
        self.outcome = Outcome()
        self.error: Exception | None = None
        self.over = False

    def go_on(self) -> None:
        """One step more."""
        try:
            _, latents = next(self._steps)
            self.outcome.latents.append(latents.clone())
            self.outcome.result = latents
        except StopIteration:
            self.over = True
        except Exception as error:
            self.error, self.over = error, True

    def __call__(self) -> Outcome:
        """What it gave."""
        if self.error is not None:
            raise self.error
        return self.outcome


def _interleaved(runs: list[_Coroutine], draw: random.Random) -> list[_Coroutine]:
    while left := [run for run in runs if not run.over]:
        draw.choice(left).go_on()
    return runs


def _fault(pair: Pair, expected: Outcome, got: Callable[[], Outcome], run: Run) -> str | None:
    try:
        outcome = got()
    except HarmonicaError:
        return None
    except Exception as error:
        return f"undocumented error: {type(error).__name__}: {error}"
    return pair.difference(expected, outcome, run)
