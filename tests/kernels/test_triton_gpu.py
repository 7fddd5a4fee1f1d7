"""The Triton kernels on a CUDA device: all comparisons of the interpreter tier, and what it cannot show."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from harmonica_kernels import residual_reuse_norm_modulate
from tests.kernels.test_residual_reuse_norm_modulate import draw
from tests.kernels.triton_comparisons import *  # noqa: F403 - its tests are run here

pytestmark = pytest.mark.gpu


def test_captured_in_a_cuda_graph() -> None:
    arguments = draw((2, 3, 1152), torch.bfloat16).map(torch.Tensor.cuda)
    residual_reuse_norm_modulate(*arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = residual_reuse_norm_modulate(*arguments)
    arguments.x.normal_()
    graph.replay()
    for found, expected in zip(captured, residual_reuse_norm_modulate(*arguments), strict=True):
        assert torch.equal(found, expected)
