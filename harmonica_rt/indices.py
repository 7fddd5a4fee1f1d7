"""The index spaces of a plan, as distinct types, so that one cannot be passed for another."""

from __future__ import annotations

from typing import NamedTuple, NewType

StepIndex = NewType("StepIndex", int)  # 0 = first (noisiest) step of a run
SiteIndex = NewType("SiteIndex", int)  # column of the schedule
SlotId = NewType("SlotId", int)
ProgramId = NewType("ProgramId", int)


class SiteOutput(NamedTuple):
    """One output tensor of one site (a joint-attention site has two)."""

    site: SiteIndex
    output: int


class PastOutput(NamedTuple):
    """The value of a site output from the `age`-th latest step that computed it; age 0 is the latest."""

    output: SiteOutput
    age: int
