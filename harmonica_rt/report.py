"""What a compiled model computes, reuses, stores and saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from harmonica_rt.errors import CaptureFailure
from harmonica_rt.execute.plan_cache import PlanKey, Plans
from harmonica_rt.execute.plan_stream import PlanRuntime
from harmonica_rt.lower.inductor import InductorLowering
from harmonica_rt.sampling.run import RunStats
from harmonica_rt.schedule import Schedule
from harmonica_rt.untrusted.text import printable


@dataclass(frozen=True)
class StepReport:
    """One step: number of sites computed, reused and stored, its program, and its FLOPs for one call."""

    step: int
    computed: int
    reused: int
    stored: int
    program: int
    flops: int


@dataclass(frozen=True)
class PlanReport:
    """One plan.

    Attributes:
        signature: shapes and dtypes it is for.
        steps: one entry per step.
        programs: number of step programs.
        programs_with_addresses: number of (program, slot addresses) pairs, for a backend that bakes addresses in.
        full_flops: FLOPs of one call of the uncached model.
        theoretical_speedup: FLOPs of an uncached run / FLOPs of this plan's run.
        slots: number of slots.
        arena_bytes: planned cache bytes, all devices.
        lower_bound_bytes: the most bytes of stored values alive in any step; no arena can be smaller.
        site_addresses_bytes: bytes needed to give each site output one address for the whole run.
        capture_seconds, plan_seconds, lower_seconds: compile time by stage.
        compile_seconds: total compile time, including the checks of the plan.
        held_bytes: bytes held now: arenas, the inputs of graphs, and memory that graphs reserved.
        hoisted: number of values computed before the steps.
        hoisted_bytes: bytes that these values take per stream.
        fusions: per step program, the number of fused calls by operator, and of residuals and norms left unfused;
            empty where nothing is fused.
        reasons: why residuals and norms were left, with counts, over all programs.
        regions: number of unique regions, each compiled once; 0 where the lowering compiles none.
        region_calls: number of region calls in each step program; empty where the lowering compiles none.
        region_seconds: time spent compiling, part of `lower_seconds` (except for regions that catch-ups needed later).
        whole: number of step programs that were also compiled whole, and how many of them measured faster that way;
            None where the lowering compiles nothing.
    """

    signature: str
    steps: tuple[StepReport, ...]
    programs: int
    programs_with_addresses: int
    full_flops: int
    theoretical_speedup: float
    slots: int
    arena_bytes: int
    lower_bound_bytes: int
    site_addresses_bytes: int
    capture_seconds: float
    plan_seconds: float
    lower_seconds: float
    compile_seconds: float
    held_bytes: int
    hoisted: int
    hoisted_bytes: int
    fusions: tuple[dict[str, int], ...]
    reasons: dict[str, int]
    regions: int
    region_calls: tuple[int, ...]
    region_seconds: float
    whole: tuple[int, int] | None

    @classmethod
    def of(cls, runtime: PlanRuntime, signature: str) -> PlanReport:
        """Read a plan and what it was lowered to."""
        plan, lowered, steps = runtime.plan, runtime.lowered, []
        inductor = lowered if isinstance(lowered, InductorLowering) else None
        for index, step in enumerate(plan.steps):
            row = plan.schedule.compute[index]
            steps.append(
                StepReport(
                    step=index,
                    computed=int(row.sum()),
                    reused=int((~row).sum()),
                    stored=len({output.site for output in plan.programs[step.program].stores}),
                    program=step.program,
                    flops=plan.program_flops[step.program],
                )
            )
        return cls(
            signature=signature,
            steps=tuple(steps),
            programs=len(plan.programs),
            programs_with_addresses=plan.programs_with_addresses,
            full_flops=plan.full_flops,
            theoretical_speedup=plan.theoretical_speedup,
            slots=len(plan.table.slots),
            arena_bytes=sum(plan.table.arena_bytes.values()),
            lower_bound_bytes=sum(plan.table.lower_bound.values()),
            site_addresses_bytes=plan.table.site_addresses_bytes,
            capture_seconds=plan.captured.seconds,
            plan_seconds=plan.seconds,
            lower_seconds=runtime.lower_seconds,
            compile_seconds=runtime.compile_seconds,
            held_bytes=runtime.nbytes,
            hoisted=len(lowered.prologue.names) if lowered.prologue else 0,
            hoisted_bytes=lowered.prologue.nbytes if lowered.prologue else 0,
            fusions=lowered.fusions,
            reasons=lowered.reasons,
            regions=inductor.regions if inductor else 0,
            region_calls=inductor.region_calls if inductor else (),
            region_seconds=inductor.seconds if inductor else 0.0,
            whole=_whole(inductor) if inductor else None,
        )


@dataclass(frozen=True)
class GraphReport:
    """CUDA graphs of all plans.

    Attributes:
        recorded: number of graphs, of step programs and prologues.
        pool_bytes: bytes that they reserved for the values they compute; the graphs of a plan share one pool.
        static_bytes: bytes of the tensors that inputs are copied into.
        refusals: why step programs and prologues run without a graph, with counts.
    """

    recorded: int
    pool_bytes: int
    static_bytes: int
    refusals: dict[str, int]

    @classmethod
    def of(cls, plans: Plans) -> GraphReport:
        """Read the graphs of all plans."""
        runtimes = plans.held.values()
        held = [graphs for runtime in runtimes for graphs in runtime.graphs]
        return cls(
            recorded=sum(map(len, held)),
            pool_bytes=plans.pool_bytes or 0,
            static_bytes=sum(runtime.static_bytes for runtime in runtimes),
            refusals=dict(Counter(str(refusal) for each in held for refusal in each.refusals.values())),
        )


@dataclass(frozen=True)
class Report:
    """A compiled model: its schedule, its plans, and what the last run actually did.

    Attributes:
        model: class name of the model.
        cur: cache utilisation ratio of the schedule.
        plans: one entry per plan in the cache; empty before the first call.
        fallbacks: why calls of some signatures run eagerly.
        last_calls: denoiser calls of the last (or current) run.
        last_cur: share of entries that the last run actually reused; None before the first run.
        last_catch_ups: steps of the last run that were computed in full because a stream lacked features.
        last_first: the step of the schedule that the last run began with; image-to-image skips those before it.
        cache_bytes: bytes of all arenas held now.
        graphs: CUDA graphs; None where there are none.
    """

    model: str
    cur: float
    plans: tuple[PlanReport, ...]
    fallbacks: tuple[str, ...]
    last_calls: int
    last_cur: float | None
    last_catch_ups: tuple[int, ...]
    cache_bytes: int
    graphs: GraphReport | None = None
    last_first: int = 0

    @classmethod
    def of(
        cls,
        model: str,
        schedule: Schedule,
        plans: Plans,
        stats: RunStats | None,
        failures: Mapping[PlanKey, CaptureFailure] | None = None,
    ) -> Report:
        """Read the plans of a model, and what its last run did."""
        return cls(
            model=model,
            cur=schedule.cur,
            plans=tuple(PlanReport.of(runtime, str(signature)) for signature, runtime in plans.held.items()),
            fallbacks=tuple(f"{signature}: {failure}" for signature, failure in (failures or {}).items()),
            last_calls=stats.calls if stats is not None else 0,
            last_cur=stats.reused / stats.entries if stats is not None and stats.entries else None,
            last_catch_ups=tuple(stats.catch_ups) if stats is not None else (),
            cache_bytes=sum(runtime.cache_bytes for runtime in plans.held.values()),
            graphs=GraphReport.of(plans) if plans.pool_bytes is not None else None,
            last_first=stats.first if stats is not None else 0,
        )

    @property
    def cached(self) -> bool:
        """Whether the last run reused anything at all."""
        return bool(self.last_cur)

    def __str__(self) -> str:
        lines = [f"{self.model}, schedule CUR {self.cur:.2%}"]
        for plan in self.plans:
            lines += _plan_lines(plan)
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
                f"cache {_mib(self.cache_bytes)}"
            )
        if self.last_first:
            lines.append(f"it began at step {self.last_first} of the schedule: the steps before were left out")
        if self.last_catch_ups:
            lines.append(f"steps computed in full to catch up: {', '.join(map(str, self.last_catch_ups))}")
        return printable("\n".join(lines))


def _whole(lowered: InductorLowering) -> tuple[int, int]:
    choices = lowered.choices
    return len(choices), sum(choice.chosen is choice.second for choice in choices)


def _plan_lines(plan: PlanReport) -> list[str]:
    lines = [
        f"plan for {plan.signature}",
        f"  theoretical speed-up {plan.theoretical_speedup:.2f}x ({plan.full_flops / 1e9:.2f} GFLOP a call uncached)",
        f"  {plan.programs} step programs ({plan.programs_with_addresses} with addresses), {plan.slots} slots in "
        f"{_mib(plan.arena_bytes)} (lower bound {_mib(plan.lower_bound_bytes)}, one address per site "
        f"{_mib(plan.site_addresses_bytes)})",
        f"  compiled in {plan.compile_seconds:.2f} s: capture {plan.capture_seconds:.2f}, plan "
        f"{plan.plan_seconds:.2f}, lower {plan.lower_seconds:.2f}; holds {_mib(plan.held_bytes)}",
    ]
    if plan.hoisted:
        lines.append(f"  {plan.hoisted} values are computed before the steps, {_mib(plan.hoisted_bytes)} a stream")
    if plan.fusions:
        totals: Counter[str] = sum((Counter(counts) for counts in plan.fusions), Counter())
        lines.append(
            f"  fused, over all programs: {', '.join(f'{n} {name}' for name, n in totals.items()) or 'nothing'}"
        )
    lines += [f"  not fused: {n} x {reason}" for reason, n in plan.reasons.items()]
    if plan.region_calls:
        lines.append(
            f"  {plan.regions} unique regions compiled in {plan.region_seconds:.2f} s, called "
            f"{sum(plan.region_calls)} times by {plan.programs} programs"
        )
    if plan.whole and plan.whole[0]:
        compiled, faster = plan.whole
        lines.append(f"  {compiled} of the programs compiled whole as well, {faster} of them faster so")
    lines.append("  step  computed  reused  stored  program     GFLOP")
    for step in plan.steps:
        lines.append(
            f"  {step.step:4d}  {step.computed:8d}  {step.reused:6d}  {step.stored:6d}  {step.program:7d}  "
            f"{step.flops / 1e9:8.3f}"
        )
    return lines


def _graph_lines(graphs: GraphReport) -> list[str]:
    lines = [
        f"{graphs.recorded} CUDA graphs: pool {_mib(graphs.pool_bytes)}, static inputs {_mib(graphs.static_bytes)}"
    ]
    return lines + [f"  {n} x no graph: {reason}" for reason, n in graphs.refusals.items()]


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
