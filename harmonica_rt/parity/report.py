"""The results of a verification."""

from __future__ import annotations

from dataclasses import dataclass, field

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.parity.tolerance import Error


@dataclass(frozen=True)
class StepParity:
    """One call of one step: the compiled output against the reference's, on the reference's inputs.

    `error` is against the reference if the tolerance is exact, against the higher precision if it is measured; `limit`
    is what is allowed of it. `site` is the first site that diverges, if the call failed and one was found.
    """

    step: int
    error: Error
    limit: Error
    same_bits: bool
    ok: bool
    site: str | None = None


@dataclass(frozen=True)
class TrajectoryParity:
    """The final result of a free-running compiled run. `error` is measured as in `StepParity`."""

    error: Error
    limit: Error
    same_bits: bool
    ok: bool


@dataclass
class ParityReport:
    """Parity of each step, on the reference's inputs, and of the free-running trajectory.

    Attributes:
        tolerance: `exact` or `measured`.
        steps: one entry per call, in order.
        trajectory: the result of a free-running compiled run; None before it has run, or if it has no arrays.
    """

    tolerance: str
    steps: list[StepParity] = field(default_factory=list)
    trajectory: TrajectoryParity | None = None

    @property
    def ok(self) -> bool:
        """Whether every step and the result of the free run are within their limits."""
        ran_well = self.trajectory is None or self.trajectory.ok
        return bool(self.steps) and all(step.ok for step in self.steps) and ran_well

    @property
    def trajectory_same_bits(self) -> bool | None:
        """Whether the results of the free runs are equal bit for bit; None before they have run."""
        return None if self.trajectory is None else self.trajectory.same_bits

    @property
    def first_failure(self) -> StepParity | None:
        """The first call that is not within its limit, or None."""
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
        if (run := self.trajectory) is not None:
            allowed = "" if run.ok else f" (allowed {run.limit.rms:.3g} and {run.limit.largest:.3g})"
            found = f"rms {run.error.rms:.3g}, largest {run.error.largest:.3g}"
            lines.append(f"  free-running result: {'equal bit for bit' if run.same_bits else found}{allowed}")
        return "\n".join(lines)


class ParityError(HarmonicaError, AssertionError):
    """The compiled model does not match the reference.

    Attributes:
        report: the full report.
        step: the first step that diverges; None if only the free-running result does.
        site: the first site that diverges at that step, if one was found.
    """

    def __init__(self, report: ParityReport) -> None:
        failure = report.first_failure
        self.report = report
        self.step = failure.step if failure is not None else None
        self.site = failure.site if failure is not None else None
        super().__init__(str(report))
