"""Measures time and memory of a training iteration, compared with the work that the released trainer does.

`ours` is the same training at less cost. `ours, by default` is what `train` does by default: it renews lambda far more
often and measures schedules on separate samples, so that its iterations cost more and fewer are needed. What each of
them does is in `training_work`. A *walk* is an iteration without lambda: one run with a gradient per step. Optimisers
are left out: a step of AdamW takes 2 ms, a walk many seconds.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal

from benchmarks.memory import PeakMemory, resident_bytes
from benchmarks.rows import Row, spread_row
from benchmarks.timing import Spread, interleaved
from benchmarks.training_work import Case, bundled, by_default, dit_xl_2, iteration, released_iteration, renewal

RENEW_EVERY = 500  # steps, as in the paper
GIB = 2**30

Kind = Literal["ours", "released", "released, teacher detached"]


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Measure time in this process, interleaved, and memory in a new process for each kind."""
    case = bundled(2 if quick else 8, 4 if quick else 20)
    seconds = interleaved(
        {
            "ours": lambda: iteration(case),
            "released": lambda: released_iteration(case, through_teacher=True),
            "released, teacher detached": lambda: released_iteration(case, through_teacher=False),
        },
        repeats,
    )
    renewals = interleaved(
        {
            "ours": lambda: renewal(case, share_prefixes=True),
            "released": lambda: renewal(case, share_prefixes=False),
        },
        1,  # a renewal takes as long as many iterations, and the ratio is known from the number of forwards
    )
    share = case.loop.steps / RENEW_EVERY
    ours = _sums(seconds["ours"], renewals["ours"], share)
    default = by_default(case)
    rows = [_row(case, "ours", "iteration, lambda amortised", ours, "s")]
    rows += [_row(case, kind, "walk alone", seconds[kind], "s") for kind in seconds]
    rows.append(_row(case, "ours, by default", "iteration, all included", [default], "s"))
    rows.append(_row(case, "ours", "lambda, once", renewals["ours"], "s"))
    rows.append(_row(case, "released", "lambda, once", renewals["released"], "s"))
    peaks = {kind: _in_fresh_process(kind, quick) for kind in seconds}
    rows.append(_row(case, "ours", "memory of an iteration", [peaks["ours"]], "bytes"))
    for kind in ("released", "released, teacher detached"):
        theirs = _sums(seconds[kind], renewals["released"], share)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows += [
            _row(case, kind, "iteration, lambda amortised", theirs, "s"),
            _row(case, kind, "time, ours / theirs", ratios, "ratio", "at most 0.75"),
            _row(case, kind, "time, ours by default / theirs", [default / Spread.of(theirs).p50], "ratio"),
            _row(case, kind, "memory of an iteration", [peaks[kind]], "bytes"),
            _row(case, kind, "memory, ours / theirs", [peaks["ours"] / peaks[kind]], "ratio", "at most 0.6"),
        ]
    if not quick:
        rows += _in_process(_dit_xl_rows)
    return rows


def _dit_xl_rows() -> list[Row]:
    with PeakMemory() as peak:
        case = dit_xl_2(3)
        seconds = interleaved({"ours": lambda: iteration(case)}, 1)["ours"]
    steps, peak_metric = case.loop.steps - 1, "peak of the process, parameters included"
    return [
        _row(case, "ours", "step of SDT", [seconds[0] / steps], "s"),
        Row("training_cost", case.name, "ours", peak_metric, peak.peak, "bytes", target=f"at most {12 * GIB}"),
    ]


def _peak(kind: Kind, quick: bool) -> int:
    """Growth of the resident size in one iteration, in bytes."""
    case = bundled(2 if quick else 8, 3)  # what a step holds does not depend on the number of steps
    plain = case.loop.run(case.inputs, case.generators(), lambda call: call.forward())
    del plain
    before = resident_bytes()
    with PeakMemory() as memory:
        if kind == "ours":
            iteration(case)
        else:
            released_iteration(case, through_teacher=kind == "released")
    return memory.peak - before


def _in_fresh_process(kind: str, quick: bool) -> float:
    return float(_in_process(_peak, kind, quick))


def _in_process(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _sums(iterations: list[float], renewals: list[float], share: float) -> list[float]:
    return [seconds + renewals[0] * share for seconds in iterations]


def _row(case: Case, kind: str, metric: str, samples: list[float], unit: str, target: str | None = None) -> Row:
    return spread_row("training_cost", case.name, kind, metric, samples, unit, target)
