"""What torch replaces for the whole process while it traces is replaced for the tracing thread alone.

Other threads run models meanwhile. Without this, their modules would go through this thread's tracer and fail, or make
the trace fail; `torch.compiler.is_compiling()` would be true for them, so that torch takes other ways (attention rounds
otherwise, optimizers refuse); `max`, `min` and `math.pow` would be those for symbolic numbers.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import _symbolic_trace

from harmonica_rt.changes import Changes, in_this_thread

_Place = tuple[dict[str, Any], str]  # a name, in what holds it


class _TrueInThisThread:
    """A flag that torch only tests for truth."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread


class _Patcher(_symbolic_trace._Patcher):
    """Replaces methods of `nn.Module` for this thread, and functions of no module but torch's.

    Functions of others (`from math import sqrt`) are wrapped for symbolic tracing, which hands them proxies. Here they
    get tensors or numbers, for which the wrappers do nothing; so nobody needs to see them.
    """

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        super().patch_method(cls, name, in_this_thread(new_fn, getattr(cls, name)), deduplicate)

    def patch(
        self, frame_dict: dict[str, Any], name: str, new_fn: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        if str(frame_dict.get("__name__")).partition(".")[0] == "torch":
            super().patch(frame_dict, name, new_fn, deduplicate)


def import_tracer() -> None:
    """Import what traces, which takes a while: later it would change, in a trace, what the model's names refer to."""
    for name in ("torch.export._trace", "torch.export.exported_program"):
        importlib.import_module(name)


def keep_from_other_threads(changes: Changes) -> None:
    """Let other threads notice nothing of a trace by this one until `changes` are undone."""
    symbolic = vars(_symbolic_trace)
    flags = [(vars(torch.compiler), name) for name in ("_is_compiling_flag", "_is_exporting_flag")]
    functions = [(vars(builtins), "max"), (vars(builtins), "min"), (vars(math), "pow")]
    # Whatever interrupts torch while it puts things back: they are put back here as well.
    for held, name in (*flags, *functions, (symbolic, "CURRENT_PATCHER")):
        changes.undone_by(functools.partial(held.__setitem__, name, held[name]))
    for name in ("__call__", "__getattr__"):
        changes.undone_by(functools.partial(setattr, nn.Module, name, getattr(nn.Module, name)))
    changes.set(symbolic, "_Patcher", _Patcher)
    trace = _symbolic_trace.Tracer.trace
    changes.undone_by(functools.partial(setattr, _symbolic_trace.Tracer, "trace", trace))
    setattr(_symbolic_trace.Tracer, "trace", _with_globals_of_its_own(inspect.unwrap(trace)))  # noqa: B010
    tracing = vars(importlib.import_module("torch.export._trace"))
    _keep(tracing, "_compiling_state_context", flags, changes)
    _keep(tracing, "_override_builtin_ops", functions, changes)
    # For all threads it switches oneDNN and cuDNN off, so that they would round otherwise.
    for held in (tracing, vars(importlib.import_module("torch.export.exported_program"))):
        if "_ignore_backend_decomps" in held:
            changes.set(held, "_ignore_backend_decomps", contextlib.nullcontext)


def _with_globals_of_its_own(function: Any) -> FunctionType:
    """`Tracer.trace`, whose flag says "fx is tracing" to nobody: torch.compile'd calls of all threads would refuse.

    Within torch.export it is of no account, since the flag of `is_exporting` is asked first.
    """
    copy = FunctionType(
        function.__code__, dict(function.__globals__), function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _keep(held: dict[str, Any], name: str, places: list[_Place], changes: Changes) -> None:
    """Let what the context manager `held[name]` sets at `places` be seen by this thread alone."""
    if name not in held:
        return  # of another version of torch
    context = held[name]

    @contextlib.contextmanager
    def kept() -> Iterator[None]:
        before = [place[name] for place, name in places]
        with context():
            for (place, name), otherwise in zip(places, before, strict=True):
                value = place[name]
                if value is not otherwise:
                    place[name] = in_this_thread(value, otherwise) if callable(value) else _TrueInThisThread()
            yield

    changes.set(held, name, kept)
