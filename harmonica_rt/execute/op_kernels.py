"""Compiles the Triton kernels of a plan before its first run, all at once.

The programs of a plan launch few variants of the operators' kernels, known from their graphs: dtypes, sizes, strides,
numbers of caches, gates that are there or not. Otherwise each would be compiled at its first launch, one after the
other, while the first image waits.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec

import torch
from torch import fx
from torch.utils import _pytree as pytree

from harmonica_kernels.ahead_of_time import KernelError as OpKernelError
from harmonica_kernels.ahead_of_time import OpCall, compile_kernels
from harmonica_rt.errors import KernelError
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.graph.facts import value_of

log = logging.getLogger(__name__)


def compile_ahead(lowered: LoweredPlan, device: torch.device) -> float:
    """Compile the kernels that the programs and the prologue of a plan launch on `device`; return the seconds.

    Returns 0 where there is nothing to compile: on other devices than CUDA's, or without Triton.

    Raises:
        KernelError: Triton cannot compile a kernel.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return 0.0
    started = time.perf_counter()
    try:
        count = compile_kernels(op_calls(graphs_of(lowered)), device)
    except OpKernelError as error:
        raise KernelError(str(error)) from error
    seconds = time.perf_counter() - started
    log.info("compiled the kernels of %d different calls in %.1f s", count, seconds)
    return seconds


def graphs_of(lowered: LoweredPlan) -> list[fx.Graph]:
    """The graphs that run for a plan, in which values are fake tensors."""
    prologue = lowered.lowering.prologue
    parts = (prologue.once, prologue.each) if prologue is not None else ()
    return [owner.graph for owner in itertools.chain((p.step for p in lowered.lowering.programs), parts)]


def op_calls(graphs: Iterable[fx.Graph]) -> Iterator[OpCall]:
    """The calls of this project's operators in graphs, with fake tensors as arguments."""
    for node in itertools.chain.from_iterable(graph.nodes for graph in graphs):
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "harmonica":
            args, kwargs = pytree.tree_map_only(fx.Node, value_of, (node.args, node.kwargs))
            yield OpCall(node.target._schema.name.split("::")[1], args, kwargs)
