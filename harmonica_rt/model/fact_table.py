"""Facts: values that can be compared between two walks over a model, each at a path of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

SCALARS = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, range)
BY_TEXT = (float, complex)  # not by value: NaN is unequal to itself, and -0.0 equals 0.0

# A fact is a plain value with its type, or a tuple that begins with the kind of the fact. Two kinds have names here:
SAME_AS = "same as"  # an object that was found before; followed by the index of its fact
MODEL_TENSOR = "model tensor"  # a parameter or buffer; followed by its metadata


class Is:
    """Compares an object by identity, and keeps it alive, so that no other object gets its address."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Is) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


class FactPath(NamedTuple):
    """Where a fact was found: the index of its parent fact (-1 for none), and its name under that."""

    parent: int
    name: str


class FactTable:
    """Facts in the order in which a walk found them; equal models give equal tables."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._paths: list[FactPath] = []

    def __len__(self) -> int:
        return len(self._values)

    def add(self, parent: int, name: str, value: Any) -> int:
        """Add a fact under the one with index `parent`; returns its index."""
        self._values.append(value)
        self._paths.append(FactPath(parent, name))
        return len(self._values) - 1

    def same_as(self, other: FactTable) -> bool:
        """Whether both hold the same values, in the same order."""
        return self._values == other._values

    def differences(self, other: FactTable) -> Iterator[str]:
        """Descriptions of how `other` differs, the first difference first."""
        mine, theirs = self._by_path(), other._by_path()
        for path in {**theirs, **mine}:
            before, now = mine.get(path), theirs.get(path)
            if before != now:
                yield _difference(path, before, now)

    def _by_path(self) -> dict[str, Any]:
        texts: list[str] = []
        for parent, name in self._paths:
            texts.append(f"{texts[parent]}{name}" if parent >= 0 else name)
        values = ((SAME_AS, texts[value[1]]) if _is_kind(value, SAME_AS) else value for value in self._values)
        return dict(zip((text.lstrip(".") for text in texts), values, strict=True))


def comparable_key(key: Any) -> Any:
    """A key of a dict, or an item of a set, as a value to compare: plain values by value, other objects by identity."""
    if isinstance(key, (*SCALARS, *BY_TEXT)):
        return type(key), repr(key) if isinstance(key, BY_TEXT) else key
    if isinstance(key, (tuple, frozenset)):
        items = map(comparable_key, key)
        return type(key), tuple(items) if isinstance(key, tuple) else frozenset(items)
    return Is(key)


def _is_kind(value: Any, kind: str) -> bool:
    return isinstance(value, tuple) and bool(value) and value[0] == kind


def _is_plain(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] in (*SCALARS, *BY_TEXT)


def _difference(path: str, before: Any, now: Any) -> str:
    where = path or "the model"
    if before is None:
        return f"{where} was added"
    if now is None:
        return f"{where} was removed"
    if _is_plain(before) and _is_plain(now):
        return f"{where} changed from {before[1]!s:.80} to {now[1]!s:.80}"
    if _is_kind(before, MODEL_TENSOR) and _is_kind(now, MODEL_TENSOR):
        return f"{where} changed from {before[1]} to {now[1]}"
    return f"{where} changed"
