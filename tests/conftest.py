"""Every test runs seeded, with a fixed number of threads, and with NaN in memory that nobody has written.

No test may leave torch in another mode for the next one. Nodes are traced without their stacks, which take a third of
the time of a capture and appear only in the text of an error; a test of that text asks for the fixture
`stacks_of_nodes`.
"""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch.fx import config as fx_config

if TYPE_CHECKING:
    from tests.cuda_double import CudaDouble

# Deterministic cuBLAS needs it before the first CUDA call, or each matmul warns.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among the workers of pytest-xdist, and trace without stacks."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    fx_config.do_not_emit_stack_traces = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the gpu tier without a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Let the garbage collector run less often, and pass over all that was imported: half a million objects stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)  # traces make millions of objects that live until they end


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaDouble]:
    """The double of `torch.cuda`, in its place; launches run in an order that the test's name decides."""
    from tests.cuda_double import in_place_of_cuda  # with the package, which tests without it need not load

    with in_place_of_cuda(monkeypatch, zlib.crc32(request.node.name.encode())) as double:
        yield double


@pytest.fixture
def stacks_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces as users make them, with the lines of the model that made each node."""
    monkeypatch.setattr(fx_config, "do_not_emit_stack_traces", False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """`torch.empty` and its kin give NaN (integers: the largest): what is read before it is written shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # the fill works under it only
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(autouse=True)
def no_mode_left_behind() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, no dispatch mode on the stack: as torch begins."""
    yield
    left = []
    if not torch.is_grad_enabled():
        left.append("gradients are off")
        torch.set_grad_enabled(True)
    if torch.is_inference_mode_enabled():
        left.append("inference mode is on")
    if torch.is_autocast_enabled("cpu"):
        left.append("autocast is on")
        torch.set_autocast_enabled("cpu", False)
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        left.append("modes are on the stack")
    assert not left, f"left behind: {', '.join(left)}"
