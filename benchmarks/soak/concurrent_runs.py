"""Several runs at once: threads with one pipeline each, and threads or coroutines that wrongly share a denoiser."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import harmonica_rt as hrt
from benchmarks.soak.loop import Loop
from benchmarks.soak.loop_subject import loop_inputs
from benchmarks.soak.outcome import Outcome, given_or_raised
from benchmarks.soak.pair import Pair
from benchmarks.soak.world import Run
from harmonica_rt.errors import HarmonicaError


def in_threads(tasks: Sequence[Callable[[], Outcome]]) -> list[Callable[[], Outcome]]:
    """Run all tasks at once, each in its own thread; each returned function returns the outcome or raises the error."""
    found: list[Callable[[], Outcome]] = [lambda: Outcome()] * len(tasks)
    start = threading.Barrier(len(tasks))

    def work(index: int) -> None:
        start.wait()
        found[index] = given_or_raised(tasks[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def faults_of_separate_pipelines(pairs: Sequence[Pair], runs: Sequence[Run]) -> list[str | None]:
    """Run once in each pair, all compiled sides at the same time; returns what is wrong with each."""
    expected = [pair.expected(run) for pair, run in zip(pairs, runs, strict=True)]
    got = in_threads([partial(pair.got, run) for pair, run in zip(pairs, runs, strict=True)])
    return [pair.judged(*judged) for pair, judged in zip(pairs, zip(expected, got, runs, strict=True), strict=True)]


def faults_of_shared_denoiser(
    pair: Pair, runs: Sequence[Run], draw: random.Random, *, threads: bool
) -> list[str | None]:
    """Run several pipelines with one denoiser at once: each must give the right latents or a documented error.

    Args:
        pair: holds the denoiser; each run but the first gets another pipeline.
        runs: the runs.
        draw: source of the pauses between steps, or of the order in which coroutines continue.
        threads: use threads; otherwise coroutines that are interleaved step by step.

    Returns:
        what is wrong with each run; None if nothing is.
    """
    expected = [pair.expected(run) for run in runs]
    loops = _loops_over(pair, len(runs))
    if threads:
        pauses = [draw.random() * 2e-3 for _ in runs]
        tasks = [
            partial(_sampled, loop, run, pair, pause) for loop, run, pause in zip(loops, runs, pauses, strict=True)
        ]
        got: Sequence[Callable[[], Outcome]] = in_threads(tasks)
    else:
        got = _interleaved([_Coroutine(loop, run, pair) for loop, run in zip(loops, runs, strict=True)], draw)
    return [_fault(pair, *given) for given in zip(expected, got, runs, strict=True)]


def _loops_over(pair: Pair, count: int) -> list[Loop]:
    """The compiled side's pipeline, and others with the same denoiser but their own schedulers."""
    first = pair.compiled.pipeline
    loops = [first]
    for _ in range(count - 1):
        other = copy.copy(first)
        other.scheduler = type(first.scheduler).from_config(first.scheduler.config)
        loops.append(other)
        if pair.world.interface == "compile":
            hrt.compile(other, pair.schedule, lowering=pair.world.lowering)
    return loops


def _sampled(loop: Loop, run: Run, pair: Pair, pause: float) -> Outcome:
    outcome = Outcome()

    def on_step_end(_: int, latents: object) -> None:
        outcome.latents.append(latents.clone())  # type: ignore[attr-defined]
        time.sleep(pause)

    outcome.result = loop(loop_inputs(run.request, pair.world.inference_steps), on_step_end)
    return outcome


class _Coroutine:
    """A run that pauses after every step."""

    def __init__(self, loop: Loop, run: Run, pair: Pair) -> None:
        self._steps = loop.steps(loop_inputs(run.request, pair.world.inference_steps))
        self.outcome = Outcome()
        self.error: Exception | None = None
        self.over = False

    def resume(self) -> None:
        """Run one more step."""
        try:
            _, latents = next(self._steps)
            self.outcome.latents.append(latents.clone())
            self.outcome.result = latents
        except StopIteration:
            self.over = True
        except Exception as error:
            self.error, self.over = error, True

    def __call__(self) -> Outcome:
        """The outcome of the run; its error is raised."""
        if self.error is not None:
            raise self.error
        return self.outcome


def _interleaved(runs: list[_Coroutine], draw: random.Random) -> list[_Coroutine]:
    while left := [run for run in runs if not run.over]:
        draw.choice(left).resume()
    return runs


def _fault(pair: Pair, expected: Outcome, got: Callable[[], Outcome], run: Run) -> str | None:
    try:
        outcome = got()
    except HarmonicaError:
        return None
    except Exception as error:
        return f"undocumented error: {type(error).__name__}: {error}"
    return pair.difference(expected, outcome, run)
