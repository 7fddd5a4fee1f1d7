"""Keeps other threads from running a model while it is traced.

Hazard: a trace takes the parameters out of the model and puts them back, so a run meanwhile would miss them.
This package's own calls of the model are registered here. Calls by others, who hold the plain model, cannot be known
in advance.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref

from torch import nn

from harmonica_rt.changes import Changes

_Held = dict[object, int]  # token -> thread; each change is one atomic operation, so that none is left half done

# model -> process id -> what is under way
_runs: weakref.WeakKeyDictionary[nn.Module, dict[int, _Held]] = weakref.WeakKeyDictionary()
_traces: weakref.WeakKeyDictionary[nn.Module, dict[int, _Held]] = weakref.WeakKeyDictionary()
POLL = 0.001  # seconds between checks; waiting is rare


def run_untraced(model: nn.Module, changes: Changes) -> None:
    """Wait until no other thread traces `model`, and keep others from tracing it until `changes` are undone."""
    runs, traces, token = _of(_runs, model), _of(_traces, model), object()
    changes.undone_by(functools.partial(runs.pop, token, None))
    while True:
        _wait_for_others(traces)
        runs[token] = threading.get_ident()
        if not _others(traces):
            return
        runs.pop(token, None)


def trace_alone(model: nn.Module, changes: Changes) -> None:
    """Wait until no other thread runs or traces `model`, and keep others from doing so until `changes` are undone.

    Hold no lock here that a run may wait for.
    """
    runs, traces, token = _of(_runs, model), _of(_traces, model), object()
    changes.undone_by(functools.partial(traces.pop, token, None))
    while True:
        _wait_for_others(traces)
        traces[token] = threading.get_ident()
        if next(iter(traces)) is token or not _others(traces):
            break
        traces.pop(token, None)  # another thread came first
        time.sleep(POLL)
    _wait_for_others(runs)


def _of(table: weakref.WeakKeyDictionary[nn.Module, dict[int, _Held]], model: nn.Module) -> _Held:
    """The entries of this process: a fork does not hold what threads of its parent hold."""
    return table.setdefault(model, {}).setdefault(os.getpid(), {})


def _others(held: _Held) -> bool:
    me = threading.get_ident()
    return any(thread != me for thread in list(held.values()))


def _wait_for_others(held: _Held) -> None:
    while _others(held):
        time.sleep(POLL)
