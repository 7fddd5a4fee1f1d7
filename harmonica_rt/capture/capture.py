"""Trace a model into one graph with every site marked.

Three hazards shape the mechanism. A graph that deep-copied the weights would double the memory and miss later updates,
so weights are placeholders here and are fetched from the model when a run starts. In-place operations could overwrite a
cache slot, or be lost to dead-code elimination, so the graph is functionalised. And a site must be cut where its values
leave the module: its outputs are the values made inside it (by `nn_module_stack`) and used outside it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from harmonica_rt.call.call import Call
from harmonica_rt.capture.export import GivenUp, export_functional, not_traced
from harmonica_rt.capture.one_thread import import_tracer
from harmonica_rt.capture.request_values import Reading, RequestReads, keep_lists_whole, reads_of
from harmonica_rt.capture.shared_draws import SharedDraws
from harmonica_rt.capture.sites import (
    StopsAtUnknownSizes,
    check_site_result,
    check_sizes,
    find_site_outputs,
    site_columns,
    without_call_suffix,
)
from harmonica_rt.changes import Changes, in_this_thread
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.indices import SiteIndex
from harmonica_rt.model.facts import Facts
from harmonica_rt.model.forward import Swapped, keep_only_own_forward, own_forward
from harmonica_rt.model.refusals import check_capturable
from harmonica_rt.model.training_mode import check_draws_nothing, modes_of
from harmonica_rt.model.use import trace_alone
from harmonica_rt.torch_state import take_capture_lock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CapturedGraph:
    """The model as one functional graph.

    Attributes:
        graph: its placeholders are weights, constants and input leaves; its output node holds a flat tuple.
        root: the module that the graph's `get_attr` nodes refer to.
        weights: placeholder name -> dotted name of the parameter or buffer in the model.
        constants: placeholder name -> tensor created by tracing.
        inputs: placeholder name -> index among the call's leaves.
        out_spec: the tree that turns the flat outputs into the model's own return type.
        sites: site paths, as in the schedule.
        site_outputs: the output nodes of each site, in graph order; empty for a site that does not run in this call.
        seconds: wall time of the capture.
        reads: the values of the request that the graph was made for; None if it holds for all requests.
    """

    graph: fx.Graph
    root: nn.Module
    weights: dict[str, str]
    constants: dict[str, torch.Tensor]
    inputs: dict[str, int]
    out_spec: pytree.TreeSpec
    sites: tuple[str, ...]
    site_outputs: tuple[tuple[fx.Node, ...], ...]
    seconds: float
    reads: RequestReads | None = None

    @functools.cached_property
    def output(self) -> fx.Node:
        """The output node."""
        return self.graph.output_node()

    def outputs_of(self, site: SiteIndex) -> tuple[fx.Node, ...]:
        """Output nodes of one site."""
        return self.site_outputs[site]


def capture(model: nn.Module, call: Call, sites: Sequence[str]) -> CapturedGraph:
    """Capture `model` for calls with the signature of `call`, with `sites` marked.

    Raises:
        CaptureError: the model cannot be captured; its `failure` names the obstacle and where it lies.
    """
    check_capturable(model)
    import_tracer()
    started = time.perf_counter()
    changes = Changes()
    with changes, changes:
        trace_alone(model, changes)  # before the lock, which a run in progress may need
        take_capture_lock(changes)
        draws = SharedDraws(changes)
        keep_only_own_forward(model, changes)
        _check_results_of(model, sites, changes)
        traced = _trace(model, call, sites, draws)
    program, values = traced.program, traced.values
    check_draws_nothing(program.graph, modes_of(model))
    weights, constants, inputs = placeholders(program, len(call.leaves))
    out_spec, reads = program.call_spec.out_spec, None
    if values is not None:
        out_spec = out_spec.child(0)
        read = _drop_outputs(program.graph, len(values))
        reads = reads_of(program, read, values, inputs, constants)
        if reads is not None and not reads.hold(call.leaves):
            detail = "what it reads of its request is something else when it is computed again"
            raise CaptureError(CaptureFailure(Obstacle.EXPORT, detail))
        program.graph.eliminate_dead_code()
    columns = site_columns(model, sites)
    return CapturedGraph(
        graph=program.graph,
        root=program.graph_module,
        weights=weights,
        constants=constants,
        inputs=inputs,
        out_spec=out_spec,
        sites=tuple(sites),
        site_outputs=find_site_outputs(program.graph, sites, lambda path: columns.get(without_call_suffix(path))),
        seconds=time.perf_counter() - started,
        reads=reads,
    )


@dataclass(frozen=True)
class _Traced:
    """A traced model.

    Attributes:
        program: the trace.
        written: what the forward changed in the model or in objects reachable from it, in words.
        values: the values of the request that it read, if the program returns what was read after its own outputs.
    """

    program: torch.export.ExportedProgram
    written: tuple[str, ...]
    values: list[torch.Tensor] | None = None


def _trace(model: nn.Module, call: Call, sites: Sequence[str], draws: SharedDraws) -> _Traced:
    """Trace a model whose forward does not change it.

    A model may build tables at its first call. So a model that changes while it is traced is run once and traced again;
    if it changes again (a counter, a store), its result may depend on how often it ran.

    Raises:
        CaptureError: the model cannot be traced, or changes whenever it runs. It is then left as it was.
    """
    traced = _trace_as_it_is(model, call, sites, draws)
    if not traced.written:
        return traced
    before = Facts(model)
    _run_once(model, call)
    traced = _trace_as_it_is(model, call, sites, draws)
    if traced.written:
        before.put_back()
        raise CaptureError(CaptureFailure(Obstacle.STATE, "; ".join(traced.written)))
    return traced


def _trace_as_it_is(model: nn.Module, call: Call, sites: Sequence[str], draws: SharedDraws) -> _Traced:
    """Trace a model and leave it as it was.

    A model that cannot be traced without values is traced again with its reads of the request answered. If that fails
    too, it is run once; if it then built tables, as models may at their first call, it is traced a third time.
    """

    def attempt(forward: Callable[..., Any]) -> _Traced | CaptureFailure:
        found = once(forward)
        if draws.unsure and not draws.watching:
            draws.watching = True
            found = once(forward)
        return found

    def once(forward: Callable[..., Any]) -> _Traced | CaptureFailure:
        changes, written = Changes(), list[str]()
        try:
            with changes, changes:
                changes.undone_by(Facts(model).put_back)  # tracing leaves valueless tensors where a forward writes
                noting = _noting_changes(draws.noting(forward), model, written)
                changes.set(model.__dict__, "forward", Swapped(noting, own_forward(model)))
                program = export_functional(model, (), call.kwargs)
            check_sizes(program.graph, site_columns(model, sites))
            if draws.drew_last:
                written.append("it draws random numbers from Python or numpy")
            return _Traced(program, tuple(written))
        except CaptureError as error:
            return error.failure  # not the error itself, which keeps the whole trace alive

    forward = own_forward(model)
    reading = Reading(call)
    first = attempt(_stopping_early(forward))
    if isinstance(first, _Traced):
        return first
    if first.obstacle is not Obstacle.EXPORT or _has_no_values(model, call):
        raise CaptureError(first)
    second = attempt(_that_reads(forward, reading))
    if isinstance(second, _Traced):
        return dataclasses.replace(second, values=reading.values)
    failure = second if reading.read_anything else first
    if failure.obstacle is not Obstacle.EXPORT or reading.refused or not _makes_something(model, call):
        raise CaptureError(failure)
    third = attempt(_that_reads(forward, reading))
    if isinstance(third, _Traced):
        return dataclasses.replace(third, values=reading.values)
    raise CaptureError(third)


def _check_results_of(model: nn.Module, sites: Sequence[str], changes: Changes) -> None:
    """Run `check_site_result` on what the sites return in this thread, until `changes` are undone."""
    mine = in_this_thread(check_site_result, lambda *_: None)
    for held in (model.get_submodule(site).__dict__ for site in sites):
        for hooks, value in (("_forward_hooks", mine), ("_forward_hooks_with_kwargs", True)):
            changes.set(held, hooks, OrderedDict({**held[hooks], "harmonica_rt": value}))


def _makes_something(model: nn.Module, call: Call) -> bool:
    """Run the model, and return whether that changed it."""
    before = Facts(model)
    _run_once(model, call)
    return bool(before.changes(model))


def _run_once(model: nn.Module, call: Call) -> None:
    with torch.no_grad():
        model(**call.kwargs)


def _has_no_values(model: nn.Module, call: Call) -> bool:
    tensors = (*model.parameters(), *(leaf for leaf in call.leaves if isinstance(leaf, torch.Tensor)))
    return any(tensor.device.type == "meta" for tensor in tensors)


def _noting_changes(forward: Callable[..., Any], model: nn.Module, changes: list[str]) -> Callable[..., Any]:
    """`forward`, recording in `changes` what it changed in the model; torch.export later undoes some of it silently."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = Facts(model)
        output = forward(*args, **kwargs)
        changes[:] = (*before.changes(model), *before.opaque)
        return output

    return run


def _stopping_early(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, giving up as soon as it cannot be traced."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with StopsAtUnknownSizes():
            return forward(*args, **kwargs)

    return _giving_up(run)


def _that_reads(forward: Callable[..., Any], reading: Reading) -> Callable[..., Any]:
    """`forward` with its reads answered; returns its result and the tensors that were read."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        changes = Changes()
        with changes, changes, reading.of(kwargs):
            keep_lists_whole(changes)
            output = forward(*args, **kwargs)
        return output, tuple(reading.tensors)

    return _giving_up(run)


def _giving_up(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, turning capture errors and errors about unknown values into `GivenUp`."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except CaptureError as error:
            raise GivenUp(error.failure) from error
        except GuardOnDataDependentSymNode as error:
            raise GivenUp(not_traced(error)) from error

    return run


def _drop_outputs(graph: fx.Graph, count: int) -> list[fx.Node]:
    """Remove the last `count` outputs from a graph, and return them."""
    output = graph.output_node()
    flat: Any = output.args[0]
    kept = len(flat) - count
    output.args = (flat[:kept],)
    return list(flat[kept:])


def placeholders(
    program: torch.export.ExportedProgram, leaves: int
) -> tuple[dict[str, str], dict[str, torch.Tensor], dict[str, int]]:
    """What each placeholder stands for: weights by name, constants, and the `leaves` user inputs by index.

    Raises:
        CaptureError: the graph takes an input of another kind, or another number of inputs than the call has.
    """
    weights: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    inputs: dict[str, int] = {}
    leaf = 0
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, TensorArgument):
                inputs[spec.arg.name] = leaf
            leaf += 1
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            weights[spec.arg.name] = spec.target
        elif spec.kind is InputKind.CONSTANT_TENSOR and spec.target is not None:
            constants[spec.arg.name] = program.constants[spec.target]
        else:
            raise CaptureError(CaptureFailure(Obstacle.EXPORT, f"the graph takes an input of kind {spec.kind.name}"))
    if leaf != leaves:
        raise CaptureError(CaptureFailure(Obstacle.EXPORT, f"the graph takes {leaf} inputs, the call has {leaves}"))
    return weights, constants, inputs
