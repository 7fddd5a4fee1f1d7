"""A model that is traced is run by nobody else meanwhile: a trace takes its weights out and puts them back.

Calls of the model that this package makes itself say so here; others (of the plain model, by whoever holds it) cannot
be known of before they come.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref

from torch import nn

from harmonica_rt.changes import Changes

_Held = dict[object, int]  # tokens -> threads; changed by one operation at a time, so that nothing is left half done

_runs: weakref.WeakKeyDictionary[nn.Module, dict[int, _Held]] = weakref.WeakKeyDictionary()
_traces: weakref.WeakKeyDictionary[nn.Module, dict[int, _Held]] = weakref.WeakKeyDictionary()
POLL = 0.001  # seconds; waiting is rare


def run_untraced(model: nn.Module, changes: Changes) -> None:
    """Wait until no other thread traces `model`, and keep it from it until `changes` are undone."""
    runs, traces, token = _of(_runs, model), _of(_traces, model), object()
    changes.undone_by(functools.partial(runs.pop, token, None))
    while True:
        _wait_for_others(traces)
        runs[token] = threading.get_ident()
        if not _others(traces):
            return
        runs.pop(token, None)


def trace_alone(model: nn.Module, changes: Changes) -> None:
    """Wait until no other thread runs or traces `model`, and keep it from it until `changes` are undone.

    Take no lock before that a run may wait for.
    """
    runs, traces, token = _of(_runs, model), _of(_traces, model), object()
    changes.undone_by(functools.partial(traces.pop, token, None))
    while True:
        _wait_for_others(traces)
        traces[token] = threading.get_ident()
        if next(iter(traces)) is token or not _others(traces):
            break
        traces.pop(token, None)  # another one came first
        time.sleep(POLL)
    _wait_for_others(runs)


def _of(table: weakref.WeakKeyDictionary[nn.Module, dict[int, _Held]], model: nn.Module) -> _Held:
    """By process: what other threads of a parent hold, a fork does not."""
    return table.setdefault(model, {}).setdefault(os.getpid(), {})


def _others(held: _Held) -> bool:
    me = threading.get_ident()
    return any(thread != me for thread in list(held.values()))


def _wait_for_others(held: _Held) -> None:
    while _others(held):
        time.sleep(POLL)
