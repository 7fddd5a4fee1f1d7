"""The kernels of a prologue: of the whole run in one batched pass, and of one step without a forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.roofline.kernel import Kernel
from benchmarks.roofline.programs import by_dtype, copies_of
from benchmarks.roofline.recorder import Recorder, meta_like
from harmonica_rt.execute.lowered_prologue import LoweredPrologue
from harmonica_rt.graph.facts import value_of
from harmonica_rt.graph.layout import distinct
from harmonica_rt.lower.hoist import Part, Prologue
from harmonica_rt.plan.plan import Plan


def of_run(prologue: Prologue, plan: Plan) -> list[Kernel]:
    """The kernels before a run whose timesteps are foreseen: values of the request, and of all steps, and their copies.

    The values of a request are copied to fixed addresses, one kernel per dtype, and so are the parts of joined tensors;
    the values of the steps are copied to a table, views of one tensor by one kernel.
    """
    recorder, lowered = Recorder(), LoweredPrologue(prologue, plan.captured.root)
    once = recorder.run(prologue.once.graph, plan.captured.root, _arguments(prologue.once))
    before, inputs, given = _parted(prologue.each)
    leaves: list[Any] = [None] * (1 + max((*prologue.each.inputs, *prologue.timesteps), default=0))
    for index, value in zip(prologue.each.inputs, inputs, strict=True):
        leaves[index] = value
    steps = len(plan.steps)
    foreseen = [leaves[i].new_empty((steps, *leaves[i].shape)) for i in prologue.timesteps if leaves[i] is not None]
    values = None
    if len(foreseen) == len(prologue.timesteps):
        with recorder, torch.no_grad():
            values = lowered.in_steps(foreseen, tuple(before), leaves, given)
    kernels = list(recorder.kernels)
    if values is None:
        kernels += of_step(prologue, plan) * steps
        values = tuple(value.new_empty((steps, *value.shape)) for value in _results(prologue.each))
    return [*kernels, *copies_of([*by_dtype(once), *by_dtype(_joined(prologue, plan)), *_by_owner(values)])]


def of_step(prologue: Prologue, plan: Plan) -> list[Kernel]:
    """The kernels that one step launches for its timestep where it is not foreseen, without the copies of values."""
    recorder = Recorder()
    recorder.run(prologue.each.graph, plan.captured.root, _arguments(prologue.each))
    return recorder.kernels


def _by_owner(values: Sequence[Tensor]) -> list[Tensor]:
    """One tensor for each that the values lie in, as large as those in it."""
    found: dict[int, dict[tuple[int, ...], Tensor]] = {}
    for value in values:
        found.setdefault(value.untyped_storage()._cdata, {})[int(value.storage_offset()), *value.shape] = value
    return [
        next(iter(views.values())).new_empty(sum(distinct(view).numel() for view in views.values()))
        for views in found.values()
    ]


def _joined(prologue: Prologue, plan: Plan) -> list[Tensor]:
    """The parameters that joined tensors are made of."""
    parameters = plan.captured.parameters
    values = {parameters[node.name]: value_of(node) for node in plan.captured.graph.nodes if node.name in parameters}
    return [meta_like(values[name]) for tensor in prologue.joined for name in tensor.parameters]


def _arguments(part: Part) -> list[Any]:
    return [meta_like(value_of(node)) for node in part.graph.nodes if node.op == "placeholder"]


def _parted(part: Part) -> tuple[list[Any], list[Any], list[Any]]:
    """The arguments of a part: parameters and constants, inputs, and given values."""
    values = _arguments(part)
    first = len(part.parameters) + len(part.constants)
    return values[:first], values[first : first + len(part.inputs)], values[first + len(part.inputs) :]


def _results(part: Part) -> Sequence[Tensor]:
    return [meta_like(value_of(node)) for node in part.graph.output_node().args[0]]  # type: ignore[union-attr,arg-type]
