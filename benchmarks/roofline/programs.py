"""The kernels of a plan under each lowering: of its step programs, of its prologue, and around a CUDA graph.

`eager` and `torch.compile` are the uncached model: the captured graph as it is, and fused as one region.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from benchmarks.roofline.fusion import fused
from benchmarks.roofline.kernel import Kernel
from benchmarks.roofline.recorder import Recorder, meta_like
from harmonica_rt.call.roles import Role
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.graph.facts import value_of
from harmonica_rt.lower import lower
from harmonica_rt.lower.fused import FusedLowering
from harmonica_rt.lower.graph_states import BodyGraph
from harmonica_rt.lower.hoist import Prologue
from harmonica_rt.lower.inductor import MOST_OF_LARGEST, MOST_OPERATORS
from harmonica_rt.lower.plain import Program, with_stores
from harmonica_rt.lower.regions import Region, divide, operators, sections, whole
from harmonica_rt.options import HOISTED
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.step_graph import ProgramGraph

LOWERINGS = ("plain", HOISTED, "fused", "inductor")
UNCACHED = ("eager", "torch.compile")


@dataclass(frozen=True, eq=False)
class Programs:
    """The step programs of a plan, lowered.

    Attributes:
        steps: the graph of each program.
        kernels: the kernels of each program.
        around: the kernels that a CUDA graph of each program needs besides: copies of inputs and outputs.
        prologue: what is computed before the steps; None where nothing is.
    """

    steps: list[ProgramGraph]
    kernels: list[list[Kernel]]
    around: list[list[Kernel]]
    prologue: Prologue | None


class _ToCompile(FusedLowering):
    """The programs that the `inductor` lowering divides into regions: what Inductor fuses itself is left to it."""

    rotary = False

    def _program(self, body: BodyGraph) -> Program:
        return Program(body, self._root, direct=True)


def programs_of(name: str, plan: Plan, roles: Sequence[Role]) -> Programs:
    """The programs of a plan under the lowering called `name`."""
    lowering = _ToCompile(plan, roles) if name == "inductor" else lower(name, plan, roles)
    steps: list[ProgramGraph] = [program.step for program in lowering.programs]
    root = plan.captured.root
    if name == "inductor":
        kernels = _compiled(plan.captured, steps)
    else:
        kernels = [_recorded(with_stores(step, direct=name != "plain"), root, _arguments(step))[0] for step in steps]
    timesteps = {index for index, role in enumerate(roles) if role is Role.TIMESTEP}
    in_rows = () if lowering.prologue is None else lowering.prologue.each.results
    around = [_around_graph(step, timesteps, in_rows) for step in steps]
    return Programs(steps, kernels, around, lowering.prologue)


def uncached(name: str, captured: CapturedGraph) -> list[Kernel]:
    """The kernels of a step of the uncached model, `eager` or under `torch.compile`."""
    arguments = [meta_like(value_of(node)) for node in captured.graph.nodes if node.op == "placeholder"]
    if name == "eager":
        return _recorded(captured.graph, captured.root, arguments)[0]
    return _as_region(captured.graph, captured.root, arguments)


def _recorded(
    graph: fx.Graph, root: nn.Module, arguments: Sequence[Any], recorder: Recorder | None = None
) -> tuple[list[Kernel], set[int]]:
    """The kernels of a graph, and the buffers that are read after it: its results and what it was given."""
    recorder = recorder or Recorder()
    results = recorder.run(graph, root, arguments)
    tensors = [leaf for leaf in pytree.tree_leaves((results, arguments)) if isinstance(leaf, Tensor)]
    return recorder.kernels, {recorder.buffer(tensor) for tensor in tensors}


def _as_region(graph: fx.Graph, root: nn.Module, arguments: Sequence[Any]) -> list[Kernel]:
    """The kernels of a graph that is compiled as one region."""
    recorder = Recorder()
    with recorder.region():
        kernels, kept = _recorded(graph, root, arguments, recorder)
    return fused(kernels, kept)


def _compiled(captured: CapturedGraph, steps: Sequence[ProgramGraph]) -> list[list[Kernel]]:
    """The kernels of each step in regions, or whole where the lowering compiles it whole too and that takes fewer."""
    sizes = [operators(step) for step in steps]
    tries_whole = sum(sizes) <= min(MOST_OPERATORS, MOST_OF_LARGEST * max(sizes, default=0))
    numbered = sections(captured)
    found = []
    for step in steps:
        kernels = _in_regions(step, numbered, captured.root)
        region = whole(step, with_stores(step, direct=False)) if tries_whole else None
        if region is not None:
            as_one = _as_region(region.graph, captured.root, _arguments(step))
            kernels = min(kernels, as_one, key=len)
        found.append(kernels)
    return found


def _in_regions(step: Any, numbered: dict[str, int], root: nn.Module) -> list[Kernel]:
    recorder = Recorder()

    def compiled(region: Region) -> Callable[..., Sequence[Tensor]]:
        def region_call(*inputs: Tensor) -> Sequence[Tensor]:
            with recorder.region():
                results: Sequence[Tensor] = recorder.interpret(region.graph, root, inputs)
                return results

        return region_call

    divided = divide(step, numbered, compiled)
    kernels, kept = _recorded(with_stores(divided, direct=True), root, _arguments(step), recorder)
    return fused(kernels, kept)


def _arguments(step: ProgramGraph) -> list[Any]:
    """Meta tensors for the arguments of a step's program, which end with one slot per store."""
    return [meta_like(value_of(node)) for node in (*step.argument_nodes, *step.stored_nodes)]


def _around_graph(step: ProgramGraph, timesteps: set[int], in_rows: Collection[str]) -> list[Kernel]:
    """What a replay launches besides the graph.

    It copies the call's tensors to their fixed addresses (one kernel per dtype), the row of hoisted values of the step
    (one per dtype), the timesteps to the record of the run, and the outputs to the caller. Hoisted values that are not
    `in_rows` belong to the request, and lie where the graph reads them.
    """
    nodes = step.argument_nodes
    first = len(step.parameters) + len(step.constants)
    inputs = nodes[first : first + len(step.inputs)]
    hoisted = nodes[first + len(step.inputs) : first + len(step.inputs) + len(step.hoisted)]
    row = (value_of(node) for node, name in zip(hoisted, step.hoisted, strict=True) if name in in_rows)
    values = [*by_dtype(map(value_of, inputs)), *by_dtype(row)]
    values += [torch.empty(1, dtype=torch.int64, device="meta")] * len(timesteps)
    values += [value_of(node) for node in step.result_nodes if isinstance(node, fx.Node)]
    return copies_of(values)


def copies_of(values: Iterable[Tensor]) -> list[Kernel]:
    """One kernel per value, which copies it."""
    recorder = Recorder()
    with recorder, torch.no_grad():
        for value in map(meta_like, values):
            torch.empty_like(value).copy_(value)
    return recorder.kernels


def by_dtype(values: Iterable[Tensor]) -> list[Tensor]:
    """One tensor per dtype, as large as all values of that dtype."""
    sizes: dict[torch.dtype, int] = {}
    for value in values:
        sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel()
    return [torch.empty(size, dtype=dtype, device="meta") for dtype, size in sizes.items()]
