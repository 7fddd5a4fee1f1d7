"""Lets one thread capture at a time, and restores that thread's torch state afterwards.

Hazard: while torch traces, it replaces methods of `nn.Module` for the whole process, and takes its stacks of modes
apart and rebuilds them. Two concurrent traces break each other: they fail, or attribute what they trace to the other's
modules.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from harmonica_rt.changes import Changes


def take_capture_lock(changes: Changes) -> None:
    """Wait until no other thread captures or compiles, and keep other threads from it until `changes` are undone.

    The lock is torch.compile's own, so captures and torch.compile wait for each other. A thread that already holds it
    goes ahead.
    """
    from torch._dynamo import convert_frame  # here, since it takes a second to import

    lock: Any = convert_frame.compile_lock
    if not lock._is_owned():
        changes.undone_by(lambda: lock.release() if lock._is_owned() else None)
        lock.acquire()


def _free_in_child() -> None:
    """Free the lock in a forked child, which may inherit it locked but without the thread that would release it."""
    convert_frame: Any = sys.modules.get("torch._dynamo.convert_frame")
    if convert_frame is not None and not convert_frame.compile_lock._is_owned():
        convert_frame.compile_lock._at_fork_reinit()


os.register_at_fork(after_in_child=_free_in_child)


def keep_torch_state(changes: Changes) -> None:
    """Restore this thread's grad mode, dispatch keys and stacks of modes when `changes` are undone.

    Torch's own context managers restore these too, unless they are interrupted.
    """
    keys = torch._C._PreserveDispatchKeyGuard()
    changes.undone_by(functools.partial(keys.__exit__, None, None, None))
    keys.__enter__()
    changes.undone_by(functools.partial(torch._C._set_grad_enabled, torch.is_grad_enabled()))
    for size_of, pop in (
        (torch._C._len_torch_function_stack, torch._C._pop_torch_function_stack),
        (torch._C._len_torch_dispatch_stack, torch._C._pop_torch_dispatch_stack),
    ):
        changes.undone_by(functools.partial(_pop_to, size_of(), size_of, pop))
    changes.undone_by(_finish_contexts)


def _finish_contexts() -> None:
    """Finish the generators of context managers whose exit was interrupted.

    Otherwise they would finish when the traceback is freed, and restore again what has already been restored.
    """
    trace = sys.exc_info()[2]
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == contextlib.__file__:
            trace.tb_frame.clear()
        trace = trace.tb_next


def _pop_to(size: int, size_of: Callable[[], int], pop: Callable[[], object]) -> None:
    while size_of() > size:
        pop()
