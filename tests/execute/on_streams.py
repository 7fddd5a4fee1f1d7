"""A compiled model whose parameters lie on the device of the double, and runs of it on several CUDA streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from tests.cuda_double import CudaDouble
from tests.execute.test_graph_replay import close
from tests.execute.test_prologue_replay import KEY, STEPS, prompted_calls, run
from tests.models import random_schedule
from tests.sampling.loops import conditioned


def on_device(model: nn.Module) -> nn.Module:
    """The model, with all its tensors in memory of the double."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model


class Case:
    """Runs of a compiled model, and what they should give.

    Args:
        cuda: the double.
        runs: requests that there are calls for, one per run.
        options: of `hrt.compile`.
    """

    def __init__(self, cuda: CudaDouble, runs: int = 5, **options: Any) -> None:
        self.cuda = cuda
        self.model = on_device(conditioned())
        schedule = random_schedule(self.model, STEPS, seed=2)
        self.compiled = hrt.compile(self.model, schedule, strict=True, **{"graphs": "on", **options})
        self.truth = hrt.reference(self.model, schedule)
        self.calls = [prompted_calls(request) for request in range(runs)]
        for calls in self.calls:
            for call in calls:
                call["prompt"] = calls[0]["prompt"]  # the very tensor, as in a pipeline
        self.expected = [run(self.truth, calls) for calls in self.calls]
        self.got: list[list[Tensor]] = []
        self.streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        cuda.synchronize()

    def run(self, on: int) -> None:
        """The next run, on one of the two streams."""
        with torch.cuda.stream(self.streams[on]):
            self.got.append(run(self.compiled, self.calls[len(self.got)], KEY))

    def right(self) -> bool:
        """Whether all outputs so far are those of the reference, once the device is done."""
        self.cuda.synchronize()
        expected = self.expected[: len(self.got)]
        return all(map(close, self.got, expected))


def allocate(stream: torch.cuda.Stream) -> None:
    """Something else allocates memory on a stream, and may get what was freed there."""
    with torch.cuda.stream(stream):
        torch.zeros(1)
