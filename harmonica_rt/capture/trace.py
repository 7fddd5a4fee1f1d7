"""Traces a model whose forward may read values of its request, build tables at its first call, or change itself.

Hazard: a trace runs the forward, which may change the model and draw random numbers. So whatever a trace changed is
undone, and a model that changes whenever it runs has no static plan.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from harmonica_rt.call.call import Call
from harmonica_rt.capture.export import GivenUp, export_functional, not_traced
from harmonica_rt.capture.request_value_mode import RequestValueMode, keep_lists_whole
from harmonica_rt.capture.shared_draws import SharedDraws
from harmonica_rt.capture.sites import StopsAtUnknownSizes, check_sizes
from harmonica_rt.changes import Changes
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.model.facts import Facts
from harmonica_rt.model.forward import Swapped, own_forward


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        exported: the trace.
        written: what the forward changed in the model or in objects reachable from it, in words.
        values: the values of the request that it read. `exported` then returns the tensors read after its own outputs.
            None if the model was traced without values.
    """

    exported: torch.export.ExportedProgram
    written: tuple[str, ...]
    values: list[torch.Tensor] | None = None


def trace(model: nn.Module, call: Call, draws: SharedDraws) -> Traced:
    """Trace a model whose forward does not change it.

    A model may build tables at its first call. So a model that changes while it is traced is run once and traced again.
    If it changes again (a counter, a store), its result may depend on how often it ran, so it is refused.

    Raises:
        CaptureError: the model cannot be traced, or changes whenever it runs. It is then left as it was.
    """
    traced = _trace_as_it_is(model, call, draws)
    if not traced.written:
        return traced
    before = Facts(model)
    _run_once(model, call)
    traced = _trace_as_it_is(model, call, draws)
    if traced.written:
        before.put_back()
        raise CaptureError(CaptureFailure(Obstacle.STATE, "; ".join(traced.written)))
    return traced


def _trace_as_it_is(model: nn.Module, call: Call, draws: SharedDraws) -> Traced:
    """Trace a model and leave it as it was.

    A model that cannot be traced without values is traced again with its reads of the request answered. If that fails
    too, it is run once; if it then built tables, as models may at their first call, it is traced a third time.
    """

    def attempt(forward: Callable[..., Any]) -> Traced | CaptureFailure:
        """Trace once; if a shared generator advanced meanwhile, trace again and watch whether the forward draws."""
        found = once(forward)
        if draws.unsure and not draws.watching:
            draws.watching = True
            found = once(forward)
        return found

    def once(forward: Callable[..., Any]) -> Traced | CaptureFailure:
        """Trace once, and undo what the trace changed in the model."""
        changes, written = Changes(), list[str]()
        try:
            with changes, changes:
                changes.undone_by(Facts(model).put_back)  # tracing leaves valueless tensors where a forward writes
                noting = _noting_changes(draws.noting(forward), model, written)
                changes.set(model.__dict__, "forward", Swapped(noting, own_forward(model)))
                exported = export_functional(model, (), call.kwargs)
            check_sizes(exported.graph)
            if draws.drew_last:
                written.append("it draws random numbers from Python or numpy")
            return Traced(exported, tuple(written))
        except CaptureError as error:
            return error.failure  # not the error itself, which keeps the whole trace alive

    forward = own_forward(model)
    mode = RequestValueMode(call)
    first = attempt(_stopping_early(forward))
    if isinstance(first, Traced):
        return first
    if first.obstacle is not Obstacle.EXPORT or _has_no_values(model, call):
        raise CaptureError(first)
    second = attempt(_answering_reads(forward, mode))
    if isinstance(second, Traced):
        return dataclasses.replace(second, values=mode.values)
    failure = second if mode.asked else first
    if failure.obstacle is not Obstacle.EXPORT or mode.refused or not _changes_when_run(model, call):
        raise CaptureError(failure)
    third = attempt(_answering_reads(forward, mode))
    if isinstance(third, Traced):
        return dataclasses.replace(third, values=mode.values)
    raise CaptureError(third)


def _changes_when_run(model: nn.Module, call: Call) -> bool:
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


def _answering_reads(forward: Callable[..., Any], mode: RequestValueMode) -> Callable[..., Any]:
    """`forward` with its reads answered; returns its result and the tensors that were read."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        changes = Changes()
        with changes, changes, mode.of(kwargs):
            keep_lists_whole(changes)
            output = forward(*args, **kwargs)
        return output, tuple(mode.tensors)

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
