"""Trace a model into one graph with every site marked.

Hazards, before the mechanism: a graph that deep-copied the weights would double the memory and miss later updates, so
weights are placeholders here and are fetched from the model when a run starts. A graph with in-place operations could
overwrite a cache slot, or lose the operation to dead-code elimination, so one is functionalised. And a site is cut
where its values leave the module: reading `nn_module_stack`, every value made inside whose users lie outside.
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
        graph: placeholders are weights, constants and input leaves; its output node holds a flat tuple.
        root: module that `get_attr` nodes of the graph refer to.
        weights: placeholder name -> dotted name of the parameter or buffer in the model.
        constants: placeholder name -> tensor made while tracing.
        inputs: placeholder name -> index among the call's leaves.
        out_spec: how the flat outputs become the model's own return type.
        sites: site paths, as in the schedule.
        site_outputs: for each site its output nodes, in graph order; none for a site that does not run in this call.
        seconds: wall time the capture took.
        reads: values of the request that the graph was made for; None where it holds for all.
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
        CaptureError: the model cannot be captured; `failure` names the obstacle and where it lies.
    """
    check_capturable(model)
    import_tracer()
    started = time.perf_counter()
    changes = Changes()
    with changes, changes:
        trace_alone(model, changes)  # before the lock, which a run under way may need
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
        written: what the forward changed of the model, or of what hangs on it, in words.
        values: what it read of its request, where its outputs are its own and, beside them, what it read.
    """

    program: torch.export.ExportedProgram
    written: tuple[str, ...]
    values: list[torch.Tensor] | None = None


def _trace(model: nn.Module, call: Call, sites: Sequence[str], draws: SharedDraws) -> _Traced:
    """Trace a model whose forward leaves it as it is.

    A model may make tables at its first call. So one that changes while it is traced is run once and traced again; if
    it changes then as well (a counter, a store), what it computes may depend on how often it ran.

    Raises:
        CaptureError: it cannot be traced, or changes whenever it runs. It is then as it was before.
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
    """Trace a model, and leave it as it was.

    One that cannot be traced without values is traced with what it reads of its request; or may be once it has run: it
    then has made the tables that it makes at its first call.
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
                changes.undone_by(Facts(model).put_back)  # tracing leaves tensors without values where a forward writes
                noting = _noting_changes(draws.noting(forward), model, written)
                changes.set(model.__dict__, "forward", Swapped(noting, own_forward(model)))
                program = export_functional(model, (), call.kwargs)
            check_sizes(program.graph, site_columns(model, sites))
            if draws.drew_last:
                written.append("it draws random numbers from Python or numpy")
            return _Traced(program, tuple(written))
        except CaptureError as error:
            return error.failure  # not the error, which holds on to all that was traced

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
    """Let `check_site_result` look at what sites return to this thread until `changes` are undone."""
    mine = in_this_thread(check_site_result, lambda *_: None)
    for held in (model.get_submodule(site).__dict__ for site in sites):
        for hooks, value in (("_forward_hooks", mine), ("_forward_hooks_with_kwargs", True)):
            changes.set(held, hooks, OrderedDict({**held[hooks], "harmonica_rt": value}))


def _makes_something(model: nn.Module, call: Call) -> bool:
    """Run the model; whether that changed it."""
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
    """`forward`, which says what it changed of its model; afterwards torch.export undoes some of that in silence."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = Facts(model)
        output = forward(*args, **kwargs)
        changes[:] = (*before.changes(model), *before.untold)
        return output

    return run


def _stopping_early(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which gives up once it cannot be traced."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with StopsAtUnknownSizes():
            return forward(*args, **kwargs)

    return _giving_up(run)


def _that_reads(forward: Callable[..., Any], reading: Reading) -> Callable[..., Any]:
    """`forward`, its reads answered and returned beside its result."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        changes = Changes()
        with changes, changes, reading.of(kwargs):
            keep_lists_whole(changes)
            output = forward(*args, **kwargs)
        return output, tuple(reading.tensors)

    return _giving_up(run)


def _giving_up(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, whose errors that are about values say that it was given up."""

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
    """Take the last `count` outputs from a graph."""
    output = graph.output_node()
    flat: Any = output.args[0]
    kept = len(flat) - count
    output.args = (flat[:kept],)
    return list(flat[kept:])


def placeholders(
    program: torch.export.ExportedProgram, leaves: int
) -> tuple[dict[str, str], dict[str, torch.Tensor], dict[str, int]]:
    """What each placeholder stands for: weights by name, constants, and the `leaves` user inputs by index."""
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
