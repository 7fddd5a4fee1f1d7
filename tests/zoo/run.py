"""Run one class of the zoo: compiled in two lowerings, each held against the reference."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import harmonica_rt as hrt
from harmonica_rt.capture.captures import captures_of
from harmonica_rt.errors import PlanFileError
from harmonica_rt.parity.report import ParityReport
from harmonica_rt.report import Report
from tests.tiny import random_schedule, randomised
from tests.zoo.entry import TINY, Entry, calls_of, model_of

STEPS = 6


@dataclass(frozen=True)
class Outcome:
    """What came of one class.

    Attributes:
        schedule: a random one, about half of it reused.
        plain: parity of the lowering `plain`.
        fused: report of the lowering `fused` after two runs, both checked step by step.
        unsaved: why its plan cannot be saved and loaded again; None where it can.
    """

    schedule: hrt.Schedule
    plain: ParityReport
    fused: Report
    unsaved: str | None

    @property
    def kinds(self) -> list[str]:
        """The sites without the numbers of their blocks."""
        return kinds_of(self.schedule.sites)


def kinds_of(sites: Iterable[str]) -> list[str]:
    """The sites without the numbers of their blocks, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", site) for site in sites))


def run(name: str, entry: Entry) -> Outcome:
    """Check one class at its tiny size.

    Raises:
        SiteError: no site was found.
        CaptureError, SignatureError: it cannot be compiled.
        ParityError: it computes something else than the reference.
    """
    torch.manual_seed(0)
    model = randomised(model_of(name, entry.config))
    kept = captures_of(model)  # tracing takes longer than all else together
    schedule = random_schedule(model, STEPS)
    calls = calls_of(entry, model, TINY, STEPS)
    plain = hrt.verify(model, schedule, calls=calls, lowering="plain")
    fused = hrt.compile(model, schedule, lowering="fused", strict=True, verify=True)
    for _ in range(2):  # what timesteps there are is known in the second run, which computes them ahead
        fused.reset()
        for call in calls:
            fused(**call)
    unsaved = why_unsaved(fused)
    del kept
    return Outcome(schedule, plain, fused.report(), unsaved)


def run_level(name: str, entry: Entry, level: str) -> ParityReport:
    """Parity of the lowering `plain` with sites of a level and two weights per entry, once `fused` is in its limits.

    Raises:
        CaptureError: an output of a block is no residual.
        ParityError: it computes something else than the reference.
    """
    torch.manual_seed(0)
    model = randomised(model_of(name, entry.config))
    kept = captures_of(model)
    schedule = hrt.Schedule.random(0.5, steps=STEPS, sites=hrt.find_sites(model, level=level), seed=1).with_taylor(1)
    calls = calls_of(entry, model, TINY, STEPS)
    hrt.verify(model, schedule, calls=calls, lowering="fused")
    plain = hrt.verify(model, schedule, calls=calls, lowering="plain")
    del kept
    return plain


def why_unsaved(compiled: hrt.CompiledModel) -> str | None:
    """Why the plan of a compiled model cannot be saved; None where it can, and what was saved can be loaded."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled.save(Path(folder) / "plan.json")
        except PlanFileError as error:
            return str(error)
        hrt.load(Path(folder) / "plan.json", compiled.model, strict=True)
    return None
