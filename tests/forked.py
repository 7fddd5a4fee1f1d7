"""Processes of their own that begin in milliseconds: forked from a server that has imported what most tests need.

The server knows nothing of the tests' process: no mode, no thread, no kernel that is defined already.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.tiny", "diffusers.pipelines.dit.pipeline_dit", "torch.export", "torch._dynamo"])


def forked(
    function: Callable[..., Any], *arguments: Any, output: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """A process of one thread that calls `function`, importable by name, and writes to `output`, a file or a pipe."""
    process = SERVER.Process(target=_call, args=(function, arguments, output, {**os.environ, **(environment or {})}))
    process.start()
    return process


def module(name: str, *words: str) -> None:
    """What `python -m NAME WORDS` does."""
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def two_by_torchrun(name: str, *words: str) -> None:
    """What `torchrun --standalone --nproc-per-node 2 -m NAME WORDS` does, its processes forked from this one."""
    local = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "one node"}
    launcher = LaunchConfig(1, 1, 2, start_method="fork", monitor_interval=0.1, **local)
    elastic_launch(launcher, module)(name, *words)


def pass_in_a_process(tests: Path, folder: Path, marks: str = "", **environment: str) -> None:
    """Run a file of tests in a process of its own, with what it writes in `folder`; all must pass."""
    output = folder / "output"
    process = forked(_run_tests, str(tests), marks, output=output, environment=environment)
    process.join()
    assert process.exitcode == 0, output.read_text()


def _run_tests(tests: str, marks: str) -> None:
    rewritten = "-Wignore::pytest.PytestAssertRewriteWarning"  # plug-ins that the server has imported
    sys.exit(int(pytest.main(["-q", "-p", "no:cacheprovider", rewritten, "-m", marks, tests])))


def _call(function: Callable[..., Any], arguments: Sequence[Any], output: Path, environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if the tests run in the background
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    target = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    function(*arguments)
