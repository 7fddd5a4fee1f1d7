"""What a fingerprint sees: all that tracing may read, whatever it is wrapped in; what it cannot see it refuses."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harmonica_rt.errors import PlanFileError
from harmonica_rt.model.fingerprint import digest


class Slotted:
    """Attributes without a dict."""

    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor


def closure(factor: float) -> Callable[[float], float]:
    return lambda value: factor * value


def nested(factor: float) -> Any:
    return functools.reduce(lambda inner, _: {"deeper": [inner]}, range(12), factor)


KINDS: dict[str, Callable[[float], Any]] = {
    "number": lambda k: k,
    "tensor": lambda k: torch.full((3,), k),
    "array": lambda k: np.full(3, k),
    "numpy number": np.float32,
    "partial": lambda k: functools.partial(operator.mul, k),
    "closure": closure,
    "bound method": lambda k: Slotted(k).__init__,  # type: ignore[misc]
    "slots": Slotted,
    "slice": lambda k: slice(int(k)),
    "nested": nested,
    "set": lambda k: {k, 0.5},
    "key with underscore": lambda k: {"_scale": k},
    "module of its own": lambda k: [nn.Dropout(k / 10)],
}


def model(value: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    module.held = value
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_another_value_is_another_fingerprint(kind: str) -> None:
    make = KINDS[kind]
    assert digest(model(make(2.0))) == digest(model(make(2.0)))
    assert digest(model(make(2.0))) != digest(model(make(3.0)))


def test_weights_count_by_layout() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert digest(one) == digest(other)
    assert digest(one) != digest(other.double())


def test_a_container_that_holds_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert digest(model(loop)) == digest(model(loop))


@pytest.mark.parametrize(
    "value", [torch.Generator(), (n for n in range(3)), memoryview(b"abc")], ids=lambda v: type(v).__name__
)
def test_what_cannot_be_told_is_refused_by_name(value: Any) -> None:
    with pytest.raises(PlanFileError, match=rf"Linear\.held: a {type(value).__name__}"):
        digest(model(value))


def test_a_class_without_a_file_is_refused() -> None:
    namespace: dict[str, Any] = {"nn": nn, "__name__": "typed_at_a_prompt"}
    exec("class Typed(nn.Linear):\n    pass", namespace)
    with pytest.raises(PlanFileError, match="not defined in a file"):
        digest(namespace["Typed"](2, 2))
