"""The options of compilation, checked when the caller gives them and passed on as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from harmonica_rt.errors import ArgumentError
from harmonica_rt.untrusted.text import described

LOWERINGS = ("plain", "fused", "inductor")
DEFAULT_LOWERING = "fused"
HOISTED = "hoisted"  # `fused` without its ops, for benchmarks to measure what the ops gain
EXACT = ("plain",)  # equal to the reference bit for bit on CPU
GRAPH_MODES = ("auto", "on", "off")
OTHER_STEPS = ("error", "resample", "plain")


class _Keywords(TypedDict, total=False):
    graphs: str
    strict: bool
    max_plans: int
    max_plan_bytes: int | None


class LoadKeywords(_Keywords, total=False):
    """The keywords of `harmonica_rt.load`; see `CompileOptions`."""

    on_other_steps: str | None


class CompileKeywords(_Keywords, total=False):
    """The keywords of `harmonica_rt.compile`; see `CompileOptions`."""

    lowering: str
    debug: bool
    on_other_steps: str


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """How plans are made and kept.

    Attributes:
        lowering: how step graphs become programs, one of `LOWERINGS`.
        graphs: whether step programs become CUDA graphs, one of `GRAPH_MODES`.
        strict: raise CaptureError instead of running eagerly.
        max_plans: number of plans kept, at least 1; the least recently used one is dropped first.
        max_plan_bytes: bytes of device memory that all plans may hold; None means a share of a GPU's memory, and no
            limit on a CPU.
        debug: fill slots with NaN before they are written and after their last read.
        on_other_steps: what becomes of runs with a number of steps that no schedule is for, one of `OTHER_STEPS`.

    Raises:
        ArgumentError: an option is invalid; the message names it, what it takes and what was given.
    """

    lowering: str = DEFAULT_LOWERING
    graphs: str = "auto"
    strict: bool = False
    max_plans: int = 8
    max_plan_bytes: int | None = None
    debug: bool = False
    on_other_steps: str = "error"

    def __post_init__(self) -> None:
        check_flags(strict=self.strict, debug=self.debug)
        check_choice("lowering", self.lowering, LOWERINGS, unlisted=(HOISTED,))
        check_choice("graphs", self.graphs, GRAPH_MODES)
        check_choice("on_other_steps", self.on_other_steps, OTHER_STEPS)
        check_whole_number("max_plans", self.max_plans, least=1)
        if self.max_plan_bytes is not None:
            check_whole_number("max_plan_bytes", self.max_plan_bytes, least=1)


def check_choice(name: str, given: object, choices: tuple[str, ...], unlisted: tuple[str, ...] = ()) -> None:
    """Raise ArgumentError unless `given` is in `choices` or `unlisted`; the message lists only `choices`."""
    if not isinstance(given, str) or given not in (*choices, *unlisted):
        raise ArgumentError(f"{name} {described(given)} is not known; choose one of {', '.join(choices)}")


def check_flags(**given: object) -> None:
    """Raise ArgumentError unless all are True or False: `strict="no"` would be taken for yes."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} must be True or False, got {described(value)}")


def check_whole_number(name: str, given: object, least: int) -> None:
    """Raise ArgumentError unless `given` is an int of at least `least`."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise ArgumentError(f"{name} must be a whole number, got {described(given)}")
    if given < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {given}")
