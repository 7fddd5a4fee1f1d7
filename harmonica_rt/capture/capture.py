"""Trace a model into one graph, and mark the sites of a schedule in it.

Three hazards shape the mechanism. A graph that deep-copied the parameters would double the memory and miss later
updates, so parameters are placeholders here and are fetched from the model when a run starts. In-place operations
could overwrite a cache slot, or be lost to dead-code elimination, so the graph is functionalised. And a site must be
cut where its values leave the module: its outputs are the values made inside it (by `nn_module_stack`) and used
outside it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from harmonica_rt.call.call import Call
from harmonica_rt.capture.captured_graph import CapturedGraph, CapturedModel, Placeholders
from harmonica_rt.capture.closed_values import fold_closed_values
from harmonica_rt.capture.one_thread import import_tracer
from harmonica_rt.capture.request_values import request_values_of
from harmonica_rt.capture.shared_draws import SharedDraws
from harmonica_rt.capture.sites import returns_an_input, site_columns, without_call_suffix
from harmonica_rt.capture.trace import trace
from harmonica_rt.changes import Changes, in_this_thread
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.model.forward import keep_only_own_forward
from harmonica_rt.model.refusals import check_capturable
from harmonica_rt.model.training_mode import check_draws_nothing, modes_of
from harmonica_rt.model.use import trace_alone
from harmonica_rt.torch_state import take_capture_lock


def capture(model: nn.Module, call: Call, sites: Sequence[str]) -> CapturedGraph:
    """Capture `model` for calls with the signature of `call`, with `sites` marked.

    Raises:
        CaptureError: see `capture_model` and `mark`.
    """
    return mark(model, capture_model(model, call), sites)


def mark(
    model: nn.Module, captured: CapturedModel, sites: Sequence[str], *, seconds: float | None = None
) -> CapturedGraph:
    """A captured model with the sites of a schedule marked; `seconds` as in `CapturedModel.marked`.

    Raises:
        CaptureError: a site cannot be cut out of the graph; its `failure` names the obstacle and where it lies.
    """
    columns = site_columns(model, sites)
    return captured.marked(sites, lambda path: columns.get(without_call_suffix(path)), seconds=seconds)


def capture_model(model: nn.Module, call: Call) -> CapturedModel:
    """Capture `model` for calls with the signature of `call`.

    Raises:
        CaptureError: the model cannot be captured; its `failure` names the obstacle and where it lies.
    """
    check_capturable(model)
    import_tracer()
    started = time.perf_counter()
    changes, unchanged = Changes(), set[int]()
    with changes, changes:
        trace_alone(model, changes)  # before the lock, which a run in progress may need
        take_capture_lock(changes)
        draws = SharedDraws(changes)
        keep_only_own_forward(model, changes)
        _watch_results(model, unchanged, changes)
        traced = trace(model, call, draws)
    exported, values = traced.exported, traced.values
    check_draws_nothing(exported.graph, modes_of(model))
    placeholders = Placeholders.of(exported, len(call.leaves))
    out_spec, found = exported.call_spec.out_spec, None
    if values is not None:  # the model read its request: what it read follows its own outputs
        out_spec = out_spec.child(0)
        read = _drop_outputs(exported.graph, len(values))
        found = request_values_of(exported, read, values, placeholders.inputs, placeholders.constants)
        if found is not None and not found.hold(call.leaves):
            detail = "the values that it reads from its request differ when they are computed again"
            raise CaptureError(CaptureFailure(Obstacle.EXPORT, detail))
        exported.graph.eliminate_dead_code()
    modules = model.named_modules(remove_duplicate=False)
    return CapturedModel(
        graph=exported.graph,
        root=exported.graph_module,
        parameters=placeholders.parameters,
        constants=fold_closed_values(exported.graph, placeholders.constants),
        inputs=placeholders.inputs,
        out_spec=out_spec,
        seconds=time.perf_counter() - started,
        request_values=found,
        unchanged=frozenset(path for path, module in modules if id(module) in unchanged),
    )


def _watch_results(model: nn.Module, unchanged: set[int], changes: Changes) -> None:
    """Add to `unchanged` the ids of modules that return an input in this thread, until `changes` are undone."""

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if returns_an_input(args, kwargs, output):
            unchanged.add(id(module))

    mine = in_this_thread(watch, lambda *_: None)
    for held in (module.__dict__ for module in model.modules() if "_forward_hooks" in module.__dict__):
        for hooks, value in (("_forward_hooks", mine), ("_forward_hooks_with_kwargs", True)):
            changes.set(held, hooks, OrderedDict({**held[hooks], "harmonica_rt": value}))


def _drop_outputs(graph: fx.Graph, count: int) -> list[fx.Node]:
    """Remove the last `count` outputs from a graph, and return them."""
    output = graph.output_node()
    flat: Any = output.args[0]
    kept = len(flat) - count
    output.args = (flat[:kept],)
    return list(flat[kept:])
