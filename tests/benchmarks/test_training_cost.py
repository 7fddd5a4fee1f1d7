"""The released trainer's work as it is modelled: the same mathematics, more of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn", reason="the digits model's package needs it")

from benchmarks.training_work import Case, bundled, iteration, released_iteration, renewal
from harmonica_training.cached_forward import first_tensor


@dataclass
class Work:
    """What a denoiser did: forwards, forwards that kept a graph, forwards that a gradient went back through."""

    forwards: int = 0
    graphs: int = 0
    backwards: int = 0
    weights: set[str] = field(default_factory=set)  # that a gradient was computed for


@contextmanager
def counted(case: Case) -> Iterator[Work]:
    work = Work()
    model: Any = case.loop.denoiser
    forward = model.forward

    def went_back(gradient: Tensor) -> None:
        work.backwards += 1

    def run(*args: Any, **kwargs: Any) -> Any:
        work.forwards += 1
        output = forward(*args, **kwargs)
        prediction = first_tensor(output)
        if prediction.requires_grad:
            work.graphs += 1
            prediction.register_hook(went_back)
        return output

    handles = [
        parameter.register_hook(lambda _, name=name: work.weights.add(name))
        for name, parameter in model.named_parameters()
    ]
    model.forward = run
    try:
        yield work
    finally:
        del model.forward
        for handle in handles:
            handle.remove()


def measured(case: Case, run: Callable[[], Tensor]) -> tuple[Tensor, Work]:
    with counted(case) as work:
        return run(), work


def test_same_gradient_more_work() -> None:
    case = bundled(1, 3)  # a first step without a loss, two with one
    ours, work = measured(case, lambda: iteration(case))
    assert (work.forwards, work.graphs, work.backwards) == (5, 2, 2)
    assert not work.weights
    assert (ours[1:] != 0).all()
    close = {"rtol": 1e-5, "atol": 1e-5 * float(ours.abs().max())}
    every = {name for name, _ in case.loop.denoiser.named_parameters()}

    spared, work = measured(case, lambda: released_iteration(case, through_teacher=False))
    assert (work.forwards, work.graphs, work.backwards) == (5, 4, 2)
    assert work.weights == every
    torch.testing.assert_close(spared, ours, **close)

    released, work = measured(case, lambda: released_iteration(case, through_teacher=True))
    assert (work.forwards, work.graphs, work.backwards) == (5, 4, 4)
    assert work.weights == every
    torch.testing.assert_close(released, ours, **close)


def test_lambda_from_the_beginning_each_time() -> None:
    case = bundled(1, 4)
    theirs, work = measured(case, lambda: renewal(case, share_prefixes=False))
    assert work.forwards == 4 * 4
    ours, work = measured(case, lambda: renewal(case, share_prefixes=True))
    assert work.forwards == 4 + 3 + 2 + 1
    assert torch.equal(ours, theirs)
