"""Defines the records in which a lowering reports what it did to a plan."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HoistingReport:
    """What is computed before the steps.

    Attributes:
        values: number of values.
        nbytes: bytes that they take per stream.
    """

    values: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class JoiningReport:
    """Linear layers of one input that are computed as one product.

    Attributes:
        products: number of such products in a step that computes all of them.
        layers: number of the layers that they stand for.
        nbytes: bytes of their joined parameters per stream.
    """

    products: int = 0
    layers: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class FusionReport:
    """What was fused, and what was not.

    Attributes:
        programs: per step program, the number of fused calls by operator, and of residuals, norms, and queries or keys
            left unfused.
        reasons: why those were left, with counts, over all programs.
    """

    programs: tuple[dict[str, int], ...]
    reasons: dict[str, int]


@dataclass(frozen=True)
class RegionReport:
    """What Inductor compiled.

    Attributes:
        unique: number of unique regions, each compiled once.
        calls: number of region calls in each step program.
        seconds: time spent compiling, part of the time of lowering (except for regions that catch-ups needed later).
        whole: number of step programs that were also compiled whole.
        whole_faster: number of those that measured faster that way.
    """

    unique: int
    calls: tuple[int, ...]
    seconds: float
    whole: int
    whole_faster: int


@dataclass(frozen=True)
class LoweringReport:
    """A lowered plan; `fusion` and `regions` are None where a lowering does no such thing."""

    hoisting: HoistingReport = field(default_factory=HoistingReport)
    joining: JoiningReport = field(default_factory=JoiningReport)
    fusion: FusionReport | None = None
    regions: RegionReport | None = None
