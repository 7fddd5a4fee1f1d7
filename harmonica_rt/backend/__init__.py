"""The backend of `torch.compile(model, backend="harmonica", options={"schedule": schedule})`.

Torch finds it by the entry point that `setup.py` declares.

In: the graphs that dynamo makes of a model, the options given to `torch.compile`, and a pipeline to follow (`attach`).
Out: a callable that runs a plan in place of each graph, and the session that counts steps and reports.

Hazard: dynamo may make several graphs of one model (for each grad mode, for other strides of an argument), so the state
of a run belongs to none of them. There is one session per model and set of options, and it is freed with the model.

Reading order: this file (what dynamo and users call), `backend_options`, `session` (which run), `graph_engine` (the
plans).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, overload

from torch import fx, nn

from harmonica_rt.arguments import check_subject
from harmonica_rt.backend.backend_options import NAME, BackendOptions
from harmonica_rt.backend.session import GraphSession
from harmonica_rt.capture.dynamo import DynamoGraph
from harmonica_rt.capture.dynamo_frame import SEE_THE_BREAK, traced_frame
from harmonica_rt.errors import HarmonicaError, ScheduleMismatchError
from harmonica_rt.model.refusals import check_capturable
from harmonica_rt.pipelines.fit import check_fit, warn_about_sampler
from harmonica_rt.pipelines.install import follower_of, held_denoiser, installed
from harmonica_rt.sampling.denoiser import Denoiser

P = TypeVar("P")

_sessions: weakref.WeakKeyDictionary[nn.Module, dict[BackendOptions, GraphSession]] = weakref.WeakKeyDictionary()


def harmonica(graph: fx.GraphModule, example_inputs: list[Any], **given: Any) -> Callable[..., Any]:
    """The backend: dynamo calls it with each graph that it makes; returns the callable that runs in the graph's place.

    Raises:
        HarmonicaError: an invalid option, or a model already compiled by `harmonica_rt.compile`.
        ScheduleMismatchError: the schedule was made for another model.
        CaptureError: the model is in training mode, or a graph break split its sites.
    """
    mode = given.pop("mode", None)
    if mode is not None or given.keys() - {"options"}:
        raise HarmonicaError(f"backend {NAME!r} has no modes; it takes options={{...}}")
    options = BackendOptions.of(given.get("options"))
    frame = traced_frame(graph)
    if follower_of(frame.model) is not None:
        raise HarmonicaError(
            f"this {type(frame.model).__name__} is compiled already, by harmonica_rt.compile(pipe, ...). Undo that "
            "first: harmonica_rt.uncompile(pipe)"
        )
    try:
        check_fit(frame.model, options.schedule)
    except ScheduleMismatchError as error:
        raise ScheduleMismatchError(
            f"{error}. If this is a part of the model that you compile: {SEE_THE_BREAK}"
        ) from error
    check_capturable(frame.model)
    traced = DynamoGraph(graph, frame, options.schedule.sites)
    frame.guard()
    # A weak reference: dynamo keeps what it compiled, and a session keeps the parameters of its last run.
    session = weakref.ref(_session(frame.model, options))

    def planned(*values: Any) -> Any:
        """Run the plan; dynamo calls this with the graph's arguments."""
        owner = session()
        if owner is None:
            raise HarmonicaError("the model of this compiled graph has been garbage-collected")
        return owner.call(traced.call(values))

    return planned


def _session(model: nn.Module, options: BackendOptions) -> GraphSession:
    of_model = _sessions.setdefault(model, {})
    if options not in of_model:
        of_model[options] = GraphSession(model, options)
    return of_model[options]


@overload
def attach(compiled: nn.Module) -> GraphSession: ...


@overload
def attach(compiled: P) -> P: ...


def attach(compiled: Any) -> Any:
    """Define where the runs of a torch.compile'd model begin and end.

    Given a pipeline whose denoiser is compiled with this backend (`pipe.transformer = torch.compile(...)`, or
    `pipe.transformer.compile(...)`), the scheduler begins the runs and counts the steps from now on, and the same
    pipeline is returned. Given a compiled model, its session is returned: each call is a step, and `reset()` begins the
    next run. The session's `report()` shows what is computed and saved; its `detach()` undoes `attach(pipe)`.

    Raises:
        ArgumentError: the argument is neither a model nor a pipeline.
        HarmonicaError: it is not compiled with this backend, or its scheduler drives another compiled model.
        ScheduleMismatchError: the schedule was made for another model.
    """
    check_subject(compiled)
    if isinstance(compiled, nn.Module):
        return _session_of(compiled)
    session = _session_of(held_denoiser(compiled))
    warn_about_sampler(compiled, session.schedule)
    session.attach(compiled)
    return compiled


def _session_of(compiled: nn.Module) -> GraphSession:
    model = getattr(compiled, "_orig_mod", compiled)
    if not is_backend_of(compiled):
        remedy = f'torch.compile(model, backend="{NAME}", options={{"schedule": schedule}}) does, or model.compile(...)'
        if isinstance(compiled, Denoiser) or installed(model) is not None:
            remedy = "harmonica_rt.compile compiled it, which needs no attach (get_compiled(pipe) has the report)"
        raise HarmonicaError(f"this {model.__class__.__name__} is not compiled with backend {NAME!r}: {remedy}")
    options = BackendOptions.of(getattr(_backend_of(compiled), "kwargs", {}).get("options"))
    check_fit(model, options.schedule)
    return _session(model, options)


def is_backend_of(compiled: nn.Module) -> bool:
    """Whether torch.compile compiled this module with this backend."""
    backend = _backend_of(compiled)
    return getattr(backend, "compiler_fn", backend) is harmonica


def _backend_of(compiled: nn.Module) -> Any:
    """The backend with its options, as `torch.compile` wrapped it; None for a module that is not compiled."""
    callback: Any = getattr(getattr(compiled, "dynamo_ctx", None), "callback", None)
    call = compiled.__dict__.get("_compiled_call_impl")
    if callback is None and isinstance(call, FunctionType):
        callback = inspect.getclosurevars(call).nonlocals.get("callback")
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return callback
