"""The `inductor` lowering: `fused`, with all between the harmonica ops compiled by Inductor, region by region.

Blocks are alike, and so are step programs, so few regions are unique. Each is compiled once with all it takes as
arguments, weights among them: those stay live, and one compiled region serves all blocks and programs.

Hazard: compiled code takes strides and dtypes of its example inputs for granted and reads whatever lies there. But
hoisted values may come out of a batched pass with strides of their own, and operators may choose others than their
fakes do; so each call compares, and copies what lies differently. A dtype that differs is an error. Shapes cannot:
signatures and weights are compared before a step runs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from harmonica_rt.capture.layout import laid_out
from harmonica_rt.capture.roles import Role
from harmonica_rt.errors import InvariantError, RegionError
from harmonica_rt.lower.fused import FusedLowering
from harmonica_rt.lower.plain import Program
from harmonica_rt.passes.hoist import cut
from harmonica_rt.passes.regions import Region, divide, sections
from harmonica_rt.passes.specialise import StepGraph
from harmonica_rt.plan.plan import Plan

# Whatever the user's settings: weights stay arguments, graphs are recorded by the runtime, nothing is tuned by timing.
# Layouts are compared here already.
OPTIONS = {"freezing": False, "triton.cudagraphs": False, "max_autotune": False, "size_asserts": False}


class InductorLowering(FusedLowering):
    """The programs of a plan, and its prologue.

    Args:
        plan: the plan.
        roles: of the leaves of its calls.

    Raises:
        RegionError: Inductor cannot compile a region.
    """

    def __init__(self, plan: Plan, roles: Sequence[Role]) -> None:
        self._sections = sections(plan.captured)
        self._compiled: dict[str, CompiledRegion] = {}
        self.seconds = 0.0  # that compiling took
        super().__init__(plan, roles)

    @property
    def regions(self) -> int:
        """Number of unique regions, each compiled once."""
        return len(self._compiled)

    @property
    def region_calls(self) -> tuple[int, ...]:
        """Number of calls of regions in each program."""
        return tuple(program.calls for program in self.programs if isinstance(program, RegionProgram))

    def _program(self, step: StepGraph) -> Program:
        body = cut(step, self._hoisted)
        return RegionProgram(body, divide(body, self._sections, self._compile), self._root)

    def _compile(self, region: Region) -> CompiledRegion:
        if region.key not in self._compiled:
            started = time.perf_counter()
            self._compiled[region.key] = CompiledRegion(region, f"region_{len(self._compiled)}")
            self.seconds += time.perf_counter() - started
        return self._compiled[region.key]


class RegionProgram(Program):
    """A step graph, run as divided into regions.

    Args:
        step: the step graph, whole, for whoever asks what it computes.
        divided: the same with calls of regions.
        root: module that its `get_attr` nodes refer to.
    """

    def __init__(self, step: StepGraph, divided: StepGraph, root: nn.Module) -> None:
        super().__init__(divided, root, direct=True)
        self.step = step
        self.calls = sum(isinstance(node.target, CompiledRegion) for node in divided.graph.nodes)


class CompiledRegion:
    """A region, compiled; called with its inputs, it returns its results.

    Raises:
        RegionError: it cannot be compiled.
    """

    def __init__(self, region: Region, name: str) -> None:
        self.__name__ = name  # graphs call their functions by name
        self._strides = [value.stride() for value in region.inputs]
        self._dtypes = [value.dtype for value in region.inputs]
        self._run = _compile(region)

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Run it."""
        for value, dtype in zip(inputs, self._dtypes, strict=True):
            if value.dtype is not dtype:
                raise InvariantError(f"{self.__name__} was compiled for {dtype} and given {value.dtype}")
        return self._run(*map(laid_out, inputs, self._strides))


def _compile(region: Region) -> Callable[..., Sequence[torch.Tensor]]:
    import torch._inductor  # heavy, and only for who asks for it

    graph = fx.Graph()
    graph.output(graph.graph_copy(region.graph, {}))  # Inductor may change what it is given
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit.*")  # torch's own use
        warnings.filterwarnings("ignore", message=".*TensorFloat32.*")  # asks for less precision than the reference has
        with FakeTensorMode(shape_env=ShapeEnv()):  # without a shape_env nothing is kept on disk
            examples: list[Any] = [
                torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
                for value in region.inputs
            ]
        try:
            compiled: Callable[..., Sequence[torch.Tensor]] = torch._inductor.compile(
                fx.GraphModule({}, graph, "Region"), examples, OPTIONS
            )
        except RuntimeError as error:
            raise RegionError(
                f"Inductor cannot compile {region.place}: {_reason(error)}. Use lowering='fused', it compiles nothing"
            ) from error
    return compiled


def _reason(error: RuntimeError) -> str:
    """The first line of a message, and the operator that it names further down, if any."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return ", ".join((lines[0], *(line for line in lines[1:] if line.startswith("target:"))))
