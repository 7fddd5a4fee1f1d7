"""What a model's forward may take for granted: everything it can read besides its arguments and its weights' values.

The hazard: a captured graph bakes in whatever Python read while it was traced - attributes, what hangs on them at any
depth, classes, closures, the functions that are called by name - and goes on with it when that has changed: a wrong
image, without an error. So all of it is written down (`walk`), as a list of facts that can be compared, together with
the containers that hold it, which tell quickly that nothing was touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

from harmonica_rt.model.identity import Contents, contents, first_change, put_back
from harmonica_rt.model.walk import BY_TEXT, CLOSED, SCALARS, Walk, package_of

TOLD = 5  # changes named in a message


class Facts:
    """What a model's forward may take for granted, as it was when this was made.

    Attributes:
        containers: what holds it, for `identity.first_change`.
        noted: the contents of each container.
        versions: of the containers, for `identity.first_change`.
        tensors: plain tensors among it: neither parameters nor buffers of the model.
        hidden: what holds its state where no container shows it (arrays, random generators, iterators), each with the
            state that it had.
        untold: where something lies whose state nothing tells, in words.
    """

    def __init__(self, model: nn.Module) -> None:
        walk = Walk(model)
        self.containers = walk.containers
        self.noted: list[Contents] = list(map(contents, self.containers))
        self.versions = bytearray(8 * len(self.containers))
        self.tensors = tuple(walk.tensors)
        self.hidden = tuple(walk.hidden)
        self.untold = tuple(walk.untold)
        self._caches = [(cache, cache.cache_info().misses) for cache in walk.caches]
        self._values = walk.values
        self._places = walk.places

    def same_as(self, other: Facts) -> bool:
        """Whether a graph captured under one holds under the other."""
        return self._values == other._values

    def differences(self, other: Facts) -> Iterator[str]:
        """What is otherwise in `other`, in words, the first difference first."""
        mine, theirs = self._by_place(), other._by_place()
        for place in {**theirs, **mine}:
            before, now = mine.get(place), theirs.get(place)
            if before != now:
                yield _told(place, before, now)

    def changes(self, model: nn.Module) -> tuple[str, ...]:
        """What is otherwise in the model now, in words; a few of many."""
        if first_change(self.containers, self.noted) < 0 and self.hidden_hold():
            return ()
        return tuple(itertools.islice(self.differences(Facts(model)), TOLD))

    def code(self) -> list[Any]:
        """The containers that hold the code of the model's packages: classes, and functions that close over nothing."""
        kinds = (type, FunctionType)
        found = [held for held in self.containers if isinstance(held, kinds) and package_of(held) not in CLOSED]
        return [held for held in found if not getattr(held, "__closure__", None)]

    def hidden_hold(self) -> bool:
        """Whether everything hidden is in the state that it had."""
        return all(hidden.tell() == told for hidden, told in self.hidden)

    def let_go(self) -> None:
        """Keep what can be compared with other facts, and none of the objects that were looked at.

        The containers and their contents hold weights, which may be gone from the model while a plan keeps its facts.
        """
        self.containers, self.noted = [], []
        self.tensors, self.hidden, self._caches = (), (), []

    def _by_place(self) -> dict[str, Any]:
        texts: list[str] = []
        for parent, name in self._places:
            texts.append(f"{texts[parent]}{name}" if parent >= 0 else name)
        values = (("the same as", texts[value[1]]) if _is_repeated(value) else value for value in self._values)
        return dict(zip((text.lstrip(".") for text in texts), values, strict=True))

    def put_back(self) -> None:
        """Let everything be again what it was, and nothing be left in caches that got something.

        Tracing leaves tensors without values there.
        """
        changed = first_change(self.containers, self.noted)
        for index in range(changed, len(self.containers)) if changed >= 0 else ():
            put_back(self.containers[index], self.noted[index])
        for hidden, told in self.hidden:
            if hidden.put_back is not None and hidden.tell() != told:
                hidden.put_back(told)
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _is_weight(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and value[0] == "weight"


def _is_plain(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] in (*SCALARS, *BY_TEXT)


def _is_repeated(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and value[0] == "the same as"


def _told(place: str, before: Any, now: Any) -> str:
    where = place or "the model"
    if before is None:
        return f"{where} was added"
    if now is None:
        return f"{where} was removed"
    if _is_plain(before) and _is_plain(now):
        return f"{where} changed from {before[1]!s:.80} to {now[1]!s:.80}"
    if _is_weight(before) and _is_weight(now):
        return f"{where} changed from {before[1]} to {now[1]}"
    return f"{where} changed"
