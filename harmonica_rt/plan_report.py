"""Reports what a plan computes, reuses, stores and holds, and how long it took to make."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from harmonica_rt.execute.plan_runtime import PlanRuntime
from harmonica_rt.indices import StepIndex
from harmonica_rt.lower.report import FusionReport, HoistingReport, JoiningReport, RegionReport
from harmonica_rt.plan.plan import Plan


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
class CompileTimes:
    """Wall time of making a plan, in seconds, by stage; `total` also includes the checks of the plan.

    `kernels` is what compiling the operators' Triton kernels took; 0 where no device needs any.
    """

    capture: float
    plan: float
    lower: float
    kernels: float
    total: float


@dataclass(frozen=True)
class PlanMemory:
    """The memory of a plan.

    Attributes:
        slots: number of slots.
        arena_bytes: planned cache bytes per stream, all devices.
        lower_bound_bytes: the most bytes of stored values alive in any step; no arena can be smaller.
        site_addresses_bytes: bytes needed to give each site output one address for the whole run.
        held_bytes: bytes held now by arenas, by the inputs of CUDA graphs, and by the pool of those graphs.
    """

    slots: int
    arena_bytes: int
    lower_bound_bytes: int
    site_addresses_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class PlanReport:
    """One plan of a compiled model.

    Attributes:
        signature: the call signature that the plan is for, as text.
        steps: one entry per step.
        programs: number of step programs.
        programs_with_addresses: number of (program, slot addresses) pairs; each is a CUDA graph of its own.
        full_flops: FLOPs of one call of the uncached model.
        times: compile time by stage.
        memory: its slots, arenas and CUDA graphs.
        hoisting: what is computed before the steps.
        joining: which linear layers are computed as one product.
        fusion: what was fused; None where nothing is.
        regions: what Inductor compiled; None where nothing is.
    """

    signature: str
    steps: tuple[StepReport, ...]
    programs: int
    programs_with_addresses: int
    full_flops: int
    times: CompileTimes
    memory: PlanMemory
    hoisting: HoistingReport
    joining: JoiningReport
    fusion: FusionReport | None
    regions: RegionReport | None

    @property
    def theoretical_speedup(self) -> float:
        """FLOPs of an uncached run / FLOPs of this plan's run; 1.0 where the model does no counted FLOPs."""
        left = sum(step.flops for step in self.steps)
        return self.full_flops * len(self.steps) / left if left else 1.0

    @classmethod
    def of(cls, runtime: PlanRuntime, signature: str) -> PlanReport:
        """Report on a plan and what it was lowered to."""
        plan, lowering = runtime.lowered.plan, runtime.lowered.lowering.report()
        return cls(
            signature=signature,
            steps=tuple(_step_report(plan, StepIndex(index)) for index in range(len(plan.steps))),
            programs=len(plan.programs),
            programs_with_addresses=plan.programs_with_addresses,
            full_flops=plan.full_flops,
            times=CompileTimes(
                plan.captured.seconds,
                plan.seconds,
                runtime.lowered.seconds,
                runtime.kernel_seconds,
                runtime.compile_seconds,
            ),
            memory=PlanMemory(
                slots=len(plan.table.slots),
                arena_bytes=sum(plan.table.arena_bytes.values()),
                lower_bound_bytes=sum(plan.table.lower_bound.values()),
                site_addresses_bytes=plan.table.site_addresses_bytes,
                held_bytes=runtime.nbytes,
            ),
            hoisting=lowering.hoisting,
            joining=lowering.joining,
            fusion=lowering.fusion,
            regions=lowering.regions,
        )


def _step_report(plan: Plan, index: StepIndex) -> StepReport:
    computed, program = plan.schedule.compute[index], plan.steps[index].program
    return StepReport(
        step=index,
        computed=int(computed.sum()),
        reused=int((~computed).sum()),
        stored=len({output.site for output in plan.programs[program].stores}),
        program=program,
        flops=plan.program_flops[program],
    )


def plan_lines(plan: PlanReport) -> list[str]:
    """A plan as lines of text."""
    memory, times, hoisting = plan.memory, plan.times, plan.hoisting
    kernels = f", kernels {times.kernels:.2f}" if times.kernels else ""
    lines = [
        f"plan for {plan.signature}, {len(plan.steps)} steps",
        f"  theoretical speed-up {plan.theoretical_speedup:.2f}x ({plan.full_flops / 1e9:.2f} GFLOP per call uncached)",
        f"  {plan.programs} step programs ({plan.programs_with_addresses} by slot addresses), {memory.slots} slots in "
        f"{mebibytes(memory.arena_bytes)} (lower bound {mebibytes(memory.lower_bound_bytes)}, one address per site "
        f"{mebibytes(memory.site_addresses_bytes)})",
        f"  compiled in {times.total:.2f} s: capture {times.capture:.2f}, plan {times.plan:.2f}, lower "
        f"{times.lower:.2f}{kernels}; holds {mebibytes(memory.held_bytes)}",
    ]
    if hoisting.values:
        lines.append(
            f"  {hoisting.values} values are computed before the steps, {mebibytes(hoisting.nbytes)} per stream"
        )
    if plan.joining.products:
        lines.append(
            f"  {plan.joining.layers} linear layers are computed as {plan.joining.products} products, whose joined "
            f"parameters take {mebibytes(plan.joining.nbytes)} per stream"
        )
    if plan.fusion is not None:
        totals: Counter[str] = sum((Counter(counts) for counts in plan.fusion.programs), Counter())
        lines.append(
            f"  fused, over all programs: {', '.join(f'{n} {name}' for name, n in totals.items()) or 'nothing'}"
        )
        lines += [f"  not fused: {n} x {reason}" for reason, n in plan.fusion.reasons.items()]
    if plan.regions is not None:
        lines.append(
            f"  {plan.regions.unique} unique regions compiled in {plan.regions.seconds:.2f} s, called "
            f"{sum(plan.regions.calls)} times by {plan.programs} programs"
        )
        if plan.regions.whole:
            lines.append(
                f"  {plan.regions.whole} of the programs also compiled whole, {plan.regions.whole_faster} of them "
                "faster that way"
            )
    lines.append("  step  computed  reused  stored  program     GFLOP")
    for step in plan.steps:
        lines.append(
            f"  {step.step:4d}  {step.computed:8d}  {step.reused:6d}  {step.stored:6d}  {step.program:7d}  "
            f"{step.flops / 1e9:8.3f}"
        )
    return lines


def mebibytes(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 2**20:.2f} MiB"
