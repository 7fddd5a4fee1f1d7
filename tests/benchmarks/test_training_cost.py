"""The released trainer's work as it is modelled: the same mathematics, more of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits model's package needs it")

from benchmarks.training_cost import bundled, iteration, released_iteration, renewal


def test_same_gradient_more_work() -> None:
    case = bundled(1, 3)
    model: Any = case.walker.denoiser
    weights = [0]
    for parameter in model.parameters():
        parameter.register_hook(lambda _: weights.__setitem__(0, weights[0] + 1))
    ours = iteration(case)
    assert weights == [0]
    detached = released_iteration(case, through_teacher=False)
    once = weights[0]
    assert once > 0
    torch.testing.assert_close(detached, ours, rtol=1e-4, atol=1e-9)
    through = released_iteration(case, through_teacher=True)
    assert weights[0] == 2 * once  # a hook runs once a backward, on what teacher and student give together
    torch.testing.assert_close(through, ours, rtol=1e-4, atol=1e-9)


def test_lambda_from_the_beginning_each_time() -> None:
    case = bundled(1, 4)
    calls = [0]
    forward = case.walker.denoiser.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(*args, **kwargs)

    case.walker.denoiser.forward = counted  # type: ignore[method-assign]
    theirs = renewal(case, share_prefixes=False)
    assert calls == [16]
    ours = renewal(case, share_prefixes=True)
    assert calls == [16 + 10]
    assert torch.equal(ours, theirs)
