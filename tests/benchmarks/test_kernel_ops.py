"""The ops to measure: what they are compared with computes the same, with no less traffic."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="rotary embeddings are diffusers'")

from benchmarks.kernel_ops import Op
from benchmarks.kernels import OPS

SHAPE = (2, 9, 72)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_providers_agree(op: Op) -> None:
    for count in {1, 2, min(2, op.most), op.most}:
        if count > op.most:
            continue
        arguments = op.draw(SHAPE, torch.float32, torch.device("cpu"), count)
        expected = op.reference(arguments)
        for provider in (op.run, op.eager):
            torch.testing.assert_close(provider(arguments), expected, rtol=1e-4, atol=1e-4)
        assert op.tensors(count) <= op.passes(count)
