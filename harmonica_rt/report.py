"""Reports what a compiled model holds and what its last run did; `print(report)` shows it as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from harmonica_rt.errors import CaptureFailure
from harmonica_rt.execute.plan_cache import PlanKey, Plans
from harmonica_rt.plan_report import PlanReport, mebibytes, plan_lines
from harmonica_rt.sampling.run_stats import RunStats
from harmonica_rt.schedule import Schedule, ScheduleSet
from harmonica_rt.untrusted.text import printable


@dataclass(frozen=True)
class GraphReport:
    """The CUDA graphs of all plans.

    Attributes:
        recorded: number of recorded graphs, those of step programs and those of prologues.
        pool_bytes: bytes that the graphs reserve for the values they compute; the graphs of a plan share one pool.
        static_bytes: bytes of the tensors that the graphs read their inputs and hoisted values from.
        refusals: why step programs and prologues run without a graph, with counts.
    """

    recorded: int
    pool_bytes: int
    static_bytes: int
    refusals: dict[str, int]

    @classmethod
    def of(cls, plans: Plans) -> GraphReport:
        """Report on the graphs of all plans."""
        runtimes = plans.held.values()
        held = [graphs for runtime in runtimes for graphs in runtime.arenas.graphs]
        return cls(
            recorded=sum(map(len, held)),
            pool_bytes=plans.pool_bytes or 0,
            static_bytes=sum(runtime.arenas.static_bytes for runtime in runtimes),
            refusals=dict(Counter(str(refusal) for each in held for refusal in each.refusals.values())),
        )


@dataclass(frozen=True)
class Report:
    """A compiled model: its schedule, its plans, and what the last run actually did.

    Attributes:
        model: class name of the model.
        steps: the numbers of steps that there are schedules for.
        cur: cache utilisation ratio of the schedule; of several, of that for the fewest steps.
        plans: one entry per plan in the cache; empty before the first call.
        fallbacks: for each signature whose calls run eagerly, the signature and the reason.
        last_calls: denoiser calls of the last (or current) run.
        last_cur: share of entries that the last run actually reused; None before the first run.
        last_catch_ups: steps of the last run that were computed in full because a stream lacked features.
        last_first: the step of the schedule that the last run began with; image-to-image skips those before it.
        last_steps: number of steps of the schedule of the last run; 0 before the first run.
        last_resampled_from: the number of steps of the schedule that it was resampled from for that run; None if it was
            not.
        last_uncached: whether the last run was uncached, because no schedule is for its number of steps.
        cache_bytes: bytes of all arenas held now.
        graphs: the CUDA graphs; None where no plan uses any.
    """

    model: str
    steps: tuple[int, ...]
    cur: float
    plans: tuple[PlanReport, ...]
    fallbacks: tuple[str, ...]
    last_calls: int
    last_cur: float | None
    last_catch_ups: tuple[int, ...]
    cache_bytes: int
    graphs: GraphReport | None = None
    last_first: int = 0
    last_steps: int = 0
    last_resampled_from: int | None = None
    last_uncached: bool = False

    @classmethod
    def of(
        cls,
        model: str,
        schedule: Schedule | ScheduleSet,
        plans: Plans,
        stats: RunStats | None,
        failures: Mapping[PlanKey, CaptureFailure] | None = None,
    ) -> Report:
        """Report on the plans of a model and on its last run."""
        schedules = ScheduleSet.of(schedule)
        under = stats.under if stats is not None else None
        return cls(
            model=model,
            steps=schedules.steps,
            cur=schedules.schedules[0].cur,
            plans=tuple(PlanReport.of(runtime, str(signature)) for signature, runtime in plans.held.items()),
            fallbacks=tuple(f"{signature}: {failure}" for signature, failure in (failures or {}).items()),
            last_calls=stats.calls if stats is not None else 0,
            last_cur=stats.reused / stats.entries if stats is not None and stats.entries else None,
            last_catch_ups=tuple(stats.catch_ups) if stats is not None else (),
            cache_bytes=sum(runtime.arenas.slot_bytes for runtime in plans.held.values()),
            graphs=GraphReport.of(plans) if plans.pool_bytes is not None else None,
            last_first=stats.first if stats is not None else 0,
            last_steps=under.schedule.steps if under is not None else 0,
            last_resampled_from=under.resampled_from if under is not None else None,
            last_uncached=under is not None and under.uncached,
        )

    @property
    def cached(self) -> bool:
        """Whether the last run reused anything at all."""
        return bool(self.last_cur)

    def __str__(self) -> str:
        several = f", {len(self.steps)} schedules for {', '.join(map(str, self.steps))} steps, the first with CUR "
        lines = [f"{self.model}{several if len(self.steps) > 1 else ', schedule CUR '}{self.cur:.2%}"]
        for plan in self.plans:
            lines += plan_lines(plan)
        if not self.plans and not self.fallbacks:
            lines.append("no plan yet: the first call makes one")
        lines += _graph_lines(self.graphs) if self.graphs is not None else []
        lines += [f"NOT COMPILED, runs eagerly: {reason}" for reason in self.fallbacks]
        if self.last_cur is None:
            lines.append("no run yet")
        else:
            nothing = "" if self.cached else "  NOTHING WAS CACHED"
            lines.append(
                f"last run: {self.last_calls} calls, {self.last_cur:.2%} of entries reused{nothing}; "
                f"cache {mebibytes(self.cache_bytes)}"
            )
        if self.last_uncached:
            lines.append(f"no schedule is for its {self.last_steps} steps, so it was uncached")
        if self.last_resampled_from is not None:
            lines.append(
                f"its schedule for {self.last_steps} steps was resampled from {self.last_resampled_from} steps"
            )
        if self.last_first:
            lines.append(f"it began at step {self.last_first} of the schedule; the steps before it were skipped")
        if self.last_catch_ups:
            lines.append(f"steps computed in full to catch up: {', '.join(map(str, self.last_catch_ups))}")
        return printable("\n".join(lines))


def _graph_lines(graphs: GraphReport) -> list[str]:
    pool, static = mebibytes(graphs.pool_bytes), mebibytes(graphs.static_bytes)
    return [
        f"{graphs.recorded} CUDA graphs: pool {pool}, static inputs {static}",
        *(f"  {n} x no graph: {reason}" for reason, n in graphs.refusals.items()),
    ]
