"""State that no container shows: the contents of arrays, and the positions of random generators and iterators.

A container is compared object by object (`identity`). These objects change without any object being replaced, so for
each there is a function that returns its state as a value that can be compared; most can be set back to such a state.
"""

from __future__ import annotations

import itertools
import operator
import random
from array import array
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import GeneratorType
from typing import Any, NamedTuple

import numpy as np
import torch

SHARED_GENERATOR: random.Random = random.seed.__self__  # type: ignore[attr-defined]  # behind the functions of `random`
LARGEST_ARRAY = 2**20  # bytes; the contents of larger arrays are not compared


class Hidden(NamedTuple):
    """The state of one object that hides it.

    Attributes:
        get: returns the state as a value that can be compared.
        restore: sets the object back to such a state; None where that is not possible.
    """

    get: Callable[[], Any]
    restore: Callable[[Any], object] | None = None


def hidden_state(value: Any) -> Hidden | None:
    """The state of an object that hides it; None for any other object."""
    if isinstance(value, np.ndarray):
        return _of_array(value)
    if isinstance(value, bytearray):
        return Hidden(lambda: bytes(value), lambda state: value.__setitem__(slice(None), state))
    if isinstance(value, array):
        return Hidden(value.tobytes, lambda state: value.__setitem__(slice(None), array(value.typecode, state)))
    if isinstance(value, memoryview):
        return Hidden(lambda: bytes(value))
    if isinstance(value, random.Random):
        return Hidden(value.getstate, value.setstate)
    if isinstance(value, np.random.RandomState):
        return Hidden(lambda: StateAsText(value.get_state()), lambda state: value.set_state(state.state))
    if isinstance(value, np.random.Generator):
        generator = value.bit_generator
        return Hidden(lambda: StateAsText(generator.state), lambda state: setattr(generator, "state", state.state))
    if isinstance(value, torch.Generator):
        return Hidden(lambda: value.get_state().numpy().tobytes())
    if isinstance(value, ContextVar):
        return Hidden(lambda: id(value.get(None)))
    if isinstance(value, itertools.count):
        return Hidden(lambda: repr(value))
    if isinstance(value, Iterator) and type(value).__module__ == "builtins" and hasattr(value, "__length_hint__"):
        return Hidden(lambda: operator.length_hint(value))
    return None


def is_opaque(value: Any) -> bool:
    """Whether an object has a state that cannot be found out."""
    return isinstance(value, GeneratorType) or (isinstance(value, Iterator) and type(value).__module__ == "itertools")


class StateAsText:
    """A state that is compared as text, since parts of it are arrays."""

    __slots__ = ("_text", "state")

    def __init__(self, state: Any) -> None:
        self.state, self._text = state, _text(state)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StateAsText) and self._text == other._text

    __hash__ = None  # type: ignore[assignment]


def _text(state: Any) -> str:
    if isinstance(state, dict):
        return repr({key: _text(value) for key, value in state.items()})
    if isinstance(state, tuple):
        return repr([_text(value) for value in state])
    return repr(state.tobytes()) if isinstance(state, np.ndarray) else repr(state)


def _of_array(value: np.ndarray[Any, Any]) -> Hidden | None:
    if value.dtype.hasobject:
        return Hidden(lambda: list(map(id, value.flat)))
    if value.nbytes > LARGEST_ARRAY:
        return None

    def restore(state: Any) -> None:
        _, shape, data = state
        value[...] = np.frombuffer(data, value.dtype).reshape(shape)

    return Hidden(lambda: (value.dtype.str, value.shape, value.tobytes()), restore)
