"""The Triton kernels on a CUDA device: all comparisons of the interpreter tier, and what it cannot show."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from harmonica_kernels import residual_reuse_norm_modulate
from tests.kernels.test_residual_reuse_norm_modulate import draw
from tests.kernels.triton_comparisons import *  # noqa: F403 - its tests are run here
from tests.kernels.triton_weights import (  # noqa: F401 - its tests are run here
    test_cancelling,
    test_forecast,
    test_forecast_that_the_reference_is_left,
    test_more_caches_per_gate_than_a_launch_takes,
    test_sums,
)
from tests.kernels.triton_weights import test_gated_residual as test_gated_residual_with_a_weight  # noqa: F401
from tests.kernels.triton_weights import test_strided_views as test_strided_views_with_weights  # noqa: F401

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
