"""The gate: a runner gets figures only after its outputs were compared with the reference under the same schedule.

The reference is eager; a second one runs one precision up. The error of a runner that follows the schedule exactly may
be at most twice the error of the eager reference, and hooks on a CPU must be equal bit for bit. Peers use other
approximations and are not gated. The difference from the uncached model is recorded for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import harmonica_rt as hrt
from benchmarks.latency.cases import Task
from benchmarks.latency.providers.base import Role, Runner
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.parity.tolerance import Allowance, Error, one_up, same_bits


class GateError(HarmonicaError):
    """A runner's output is not what its schedule gives."""


@dataclass(frozen=True)
class Truth:
    """Outputs of the reference, one per step.

    Attributes:
        expected: outputs in the case's precision.
        higher: outputs one precision up, from which the allowed error is derived.
    """

    expected: list[Tensor]
    higher: list[Tensor]

    def check(self, outputs: list[Tensor], *, exact: bool) -> str:
        """Compare outputs with the reference.

        Args:
            outputs: one output per step.
            exact: require equal bits.

        Returns:
            "bits equal" or "within tolerance".

        Raises:
            GateError: a step differs too much; the message says which one, and by how much.
        """
        allowance = Allowance()
        for expected, higher in zip(self.expected, self.higher, strict=True):
            allowance.learn(expected, higher)
        for step, (expected, higher, output) in enumerate(zip(self.expected, self.higher, outputs, strict=True)):
            if same_bits(output, expected):
                continue
            error, limit = Error.between(output, higher), allowance.limit(expected, higher)
            if exact or not error.within(limit):
                raise GateError(
                    f"step {step}: off by {error.rms:.2e} (RMS), {error.largest:.2e} (largest); "
                    + ("must be equal bit for bit" if exact else f"{limit.rms:.2e} and {limit.largest:.2e} are allowed")
                )
        same = all(same_bits(a, b) for a, b in zip(self.expected, outputs, strict=True))
        return "bits equal" if same else "within tolerance"


def truth_of(task: Task) -> Truth:
    """Run the reference in the case's precision and one precision up."""
    case, raised = task.case, one_up(task.case.dtype)
    higher = pytree.tree_map_only(Tensor, lambda t: t.to(raised) if t.is_floating_point() else t, case.calls)
    expected = _reference(case.tree(), task.schedule, case.calls)
    with case.in_precision(raised):
        return Truth(expected, _reference(case.tree(), task.schedule, higher))


def gate(role: Role, truth: Truth, outputs: list[Tensor], device: torch.device) -> str:
    """Check a runner's outputs as its role requires.

    Returns:
        the result in words, as rows have it.

    Raises:
        GateError: an output is not finite, or differs too much.
    """
    for step, output in enumerate(outputs):
        if not bool(output.isfinite().all()):
            raise GateError(f"step {step}: the output is not finite")
    if role == "peer":
        return "not gated"
    if role == "uncached":
        return "its own truth"
    return truth.check(outputs, exact=role == "hooks" and device.type == "cpu")


@torch.no_grad()
def outputs_of(runner: Runner) -> list[Tensor]:
    """The outputs of a run, one per step."""
    runner.reset()
    return [first_tensor(runner.step(index)).clone() for index in range(runner.task.case.steps)]


def first_tensor(output: Any) -> Tensor:
    """The first tensor in what a denoiser returns.

    Raises:
        TypeError: there is none.
    """
    found = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if found is None:
        raise TypeError(f"expected a tensor in the denoiser's output, got {type(output).__name__}")
    return found


def relative_rms(outputs: list[Tensor], truth: list[Tensor]) -> float:
    """RMS of the difference over all steps / RMS of the truth."""
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(outputs, truth, strict=True))
    size = sum(float(b.double().square().sum()) for b in truth)
    return float((off / size) ** 0.5)


@torch.no_grad()
def _reference(model: nn.Module, schedule: hrt.Schedule, calls: list[dict[str, Any]]) -> list[Tensor]:
    denoiser = hrt.reference(model, schedule)
    return [first_tensor(denoiser(**call)).clone() for call in calls]
