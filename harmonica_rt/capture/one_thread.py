"""Confines torch's patches during a trace, which apply to the whole process, to the tracing thread.

Other threads may run models during a trace. Without this, their modules would go through this thread's tracer and fail,
or make the trace fail; `torch.compiler.is_compiling()` would be true for them, so that torch takes other code paths
(attention rounds differently, optimizers refuse); and they would get the `max`, `min` and `math.pow` for symbolic
numbers.
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

_Place = tuple[dict[str, Any], str]  # a dict, and a name in it


class _TrueInThisThread:
    """A flag that torch only tests for truth."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread


class _Patcher(_symbolic_trace._Patcher):
    """Patches methods of `nn.Module` for this thread alone, and functions only in torch's own modules.

    Functions in other modules (`from math import sqrt`) are wrapped for symbolic tracing, which passes them proxies.
    Here they get tensors or numbers, for which the wrappers do nothing, so those functions are left alone.
    """

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        super().patch_method(cls, name, in_this_thread(new_fn, getattr(cls, name)), deduplicate)

    def patch(
        self, frame_dict: dict[str, Any], name: str, new_fn: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        if str(frame_dict.get("__name__")).partition(".")[0] == "torch":
            super().patch(frame_dict, name, new_fn, deduplicate)


def import_tracer() -> None:
    """Import the tracer before a trace: imported during one, it would change what the model's names refer to."""
    for name in ("torch.export._trace", "torch.export.exported_program"):
        importlib.import_module(name)


def keep_from_other_threads(changes: Changes) -> None:
    """Hide a trace by this thread from all other threads until `changes` are undone."""
    symbolic = vars(_symbolic_trace)
    flags = [(vars(torch.compiler), name) for name in ("_is_compiling_flag", "_is_exporting_flag")]
    functions = [(vars(builtins), "max"), (vars(builtins), "min"), (vars(math), "pow")]
    # Restored here as well, in case torch is interrupted while it restores them.
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
    # torch's version turns oneDNN and cuDNN off for all threads, which would then round differently.
    for held in (tracing, vars(importlib.import_module("torch.export.exported_program"))):
        if "_ignore_backend_decomps" in held:
            changes.set(held, "_ignore_backend_decomps", contextlib.nullcontext)


def _with_globals_of_its_own(function: Any) -> FunctionType:
    """A copy of `Tracer.trace` whose "fx is tracing" flag nobody else sees; otherwise all threads' compiled calls fail.

    The flag is not needed within torch.export, where the flag of `is_exporting` is checked first.
    """
    copy = FunctionType(
        function.__code__, dict(function.__globals__), function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _keep(held: dict[str, Any], name: str, places: list[_Place], changes: Changes) -> None:
    """Make what the context manager `held[name]` sets at `places` visible to this thread alone."""
    if name not in held:
        return  # this version of torch has none
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
