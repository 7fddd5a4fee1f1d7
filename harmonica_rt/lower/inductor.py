"""The `inductor` lowering is `fused` with the rest compiled by Inductor: region by region, or whole where faster.

Blocks are alike, and so are step programs, so few regions are unique. Each is compiled once and takes everything it
needs, parameters included, as arguments: parameters stay live, and one compiled region serves all blocks and programs.

A step program compiled in one piece has fewer launches and more to fuse, but the cost of compiling it grows with the
numbers of blocks and patterns. So this is done only where all step programs together are little larger than the largest
one (a schedule of few patterns, most of them cheap) and not too large; then the first call of each measures both, and
the faster one stays.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

from torch import nn

from harmonica_rt.call.roles import Role
from harmonica_rt.errors import RegionError
from harmonica_rt.lower import plain
from harmonica_rt.lower.compiled_region import CompiledRegion
from harmonica_rt.lower.faster_of_two import Faster
from harmonica_rt.lower.fused import FusedLowering
from harmonica_rt.lower.graph_states import BodyGraph, DividedGraph
from harmonica_rt.lower.plain import Program
from harmonica_rt.lower.regions import Region, divide, operators, sections, whole
from harmonica_rt.lower.report import LoweringReport, RegionReport
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.step_graph import ProgramGraph

log = logging.getLogger(__name__)

# Limits up to which step programs are also compiled whole. 1000 operators take about half a minute on 2 CPU cores.
MOST_OPERATORS = 1000  # of all step programs together
MOST_OF_LARGEST = 1.25  # operators of all step programs together, relative to the largest one


class InductorLowering(FusedLowering):
    """The programs of a plan, and its prologue.

    Args:
        plan: the plan.
        roles: roles of the leaves of its calls.

    Raises:
        RegionError: Inductor cannot compile a region.
    """

    rotary = False  # Inductor fuses norms and rotations by itself, and more with them

    def __init__(self, plan: Plan, roles: Sequence[Role]) -> None:
        self._sections = sections(plan.captured)
        self._compiled: dict[str, CompiledRegion] = {}
        self._seconds = 0.0  # spent compiling
        super().__init__(plan, roles)
        if _compile_whole([operators(program.step) for program in self.programs]):
            self.programs = [self._or_whole(program) for program in self.programs]

    def report(self) -> LoweringReport:
        """See `Lowering.report`."""
        choices = [program for program in self.programs if isinstance(program, Faster)]
        in_regions = (program.first if isinstance(program, Faster) else program for program in self.programs)
        regions = RegionReport(
            unique=len(self._compiled),
            calls=tuple(program.calls for program in in_regions if isinstance(program, RegionProgram)),
            seconds=self._seconds,
            whole=len(choices),
            whole_faster=sum(choice.chosen is choice.second for choice in choices),
        )
        return dataclasses.replace(super().report(), regions=regions)

    def _program(self, body: BodyGraph) -> Program:
        return RegionProgram(body, divide(body, self._sections, self._compile), self._root)

    def _or_whole(self, program: Program) -> Program:
        region = whole(program.step, plain.with_stores(program.step, direct=False))
        if region is None:
            return program
        started = time.perf_counter()
        try:
            compiled = WholeProgram(program.step, region)
        except RegionError as error:
            log.info("a step program stays in regions: %s", error)
            return program
        finally:
            self._seconds += time.perf_counter() - started
        return Faster(program, compiled)

    def _compile(self, region: Region) -> CompiledRegion:
        if region.key not in self._compiled:
            started = time.perf_counter()
            self._compiled[region.key] = CompiledRegion(region, f"region_{len(self._compiled)}")
            self._seconds += time.perf_counter() - started
        return self._compiled[region.key]


class RegionProgram(Program):
    """A step graph that runs with its regions compiled.

    Args:
        step: the undivided step graph, kept to show what the program computes.
        divided: the same graph with calls of regions.
        root: module that its `get_attr` nodes refer to.
    """

    def __init__(self, step: BodyGraph, divided: DividedGraph, root: nn.Module) -> None:
        super().__init__(divided, root, direct=True)
        self.step = step
        self.calls = sum(isinstance(node.target, CompiledRegion) for node in divided.graph.nodes)


class WholeProgram(Program):
    """A step graph compiled in one piece, stores included.

    Args:
        step: the step graph.
        region: all of it, with one extra argument per store.
    """

    def __init__(self, step: ProgramGraph, region: Region) -> None:
        self.step = step
        compiled = CompiledRegion(region, "whole", written=len(step.stored_nodes))
        self._run = lambda *inputs: tuple(compiled(*inputs))


def _compile_whole(sizes: Sequence[int]) -> bool:
    """Whether programs with these numbers of operators are also compiled whole."""
    return sum(sizes) <= min(MOST_OPERATORS, MOST_OF_LARGEST * max(sizes, default=0))
