"""Makes a torch without CUDA answer Inductor's questions about its GPU as an H100 would.

Inductor then writes its code for `cuda:0`, and compiles the Triton kernels to machine code; `StubDriver` stands in for
the driver that they are loaded into. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers

from tests.kernels.stub_driver import StubDriver

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
    total_memory=80 * 2**30,
    gcnArchName="",
)
ANSWERS: dict[str, Any] = {
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
}

OPTIONS = {
    "force_disable_caches": True,
    "compile_threads": 1,
    "shape_padding": False,  # whether padding a product pays is measured, on real tensors
}


@contextmanager
def inductor_for_an_h100(driver: StubDriver) -> Iterator[list[str]]:
    """Within this block Inductor compiles for `cuda:0`, without its caches; yields the code that it writes."""
    written: list[str] = []
    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            if hasattr(CudaInterface, name):
                stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer)))
        # torch.cuda.is_available stays False: else tracing saves the state of the device's random numbers
        stack.enter_context(mock.patch.object(CudaInterface, "is_available", return_value=True))
        for name in ("exchange_device", "maybe_exchange_device"):
            stack.enter_context(mock.patch.object(CudaInterface, name, return_value=0))
        raw = mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True)
        stack.enter_context(raw)
        # the stub is Triton's active driver already
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", staticmethod(written.append)))
        stack.enter_context(config.patch(OPTIONS))
        yield written
