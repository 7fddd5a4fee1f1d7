"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass, field

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.parity.tolerance import Error


@dataclass(frozen=True)
class StepParity:
    """One call of one step: the compiled output against the reference's, on the reference's inputs.

    `error` is against the reference where the tolerance is exact, against the higher precision where it is measured.
    """

    step: int
    error: Error
    limit: Error
    same_bits: bool
    ok: bool
    site: str | None = None


@dataclass
class ParityReport:
    """Parity per step, on the reference's inputs, and of the free-running trajectory.

    Attributes:
        tolerance: `exact` or `measured`.
        steps: one entry a call, in order.
        trajectory: final result of a free-running compiled run against the reference's; None before it ran.
        trajectory_same_bits: whether the two results are equal bit for bit.
    """

    tolerance: str
    steps: list[StepParity] = field(default_factory=list)
    trajectory: Error | None = None
    trajectory_same_bits: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether every step is within its limit, and an exact trajectory is exact."""
        exact_run = self.tolerance != "exact" or self.trajectory_same_bits is not False
        return bool(self.steps) and all(step.ok for step in self.steps) and exact_run

    @property
    def first_failure(self) -> StepParity | None:
        """The first call that is not within its limit."""
        return next((step for step in self.steps if not step.ok), None)

    def __str__(self) -> str:
        same = sum(step.same_bits for step in self.steps)
        worst = max((step.error.largest for step in self.steps), default=0.0)
        lines = [
            f"parity {'ok' if self.ok else 'FAILED'} ({self.tolerance}): {len(self.steps)} calls, {same} equal bit for "
            f"bit, largest error {worst:.3g}"
        ]
        for step in self.steps:
            if not step.ok:
                lines.append(
                    f"  step {step.step}: rms {step.error.rms:.3g} (allowed {step.limit.rms:.3g}), largest "
                    f"{step.error.largest:.3g} (allowed {step.limit.largest:.3g})"
                    + (f", first divergent site {step.site}" if step.site else "")
                )
        if self.trajectory is not None:
            bits = "equal bit for bit" if self.trajectory_same_bits else f"rms {self.trajectory.rms:.3g}"
            lines.append(f"  free-running result: {bits}, largest difference {self.trajectory.largest:.3g}")
        return "\n".join(lines)


class ParityError(HarmonicaError, AssertionError):
    """What was compiled does not do what the reference does.

    Attributes:
        report: everything that was found.
        step: the first step that diverges; None where only the free-running result does.
        site: the first site that diverges in that step, where one was found.
    """

    def __init__(self, report: ParityReport) -> None:
        failure = report.first_failure
        self.report = report
        self.step = failure.step if failure is not None else None
        self.site = failure.site if failure is not None else None
        super().__init__(str(report))
