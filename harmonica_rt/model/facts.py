"""What a model's forward may take for granted: everything it can read besides its arguments and its weights' values.

Hazard: a captured graph bakes in whatever Python read during the trace - attributes, the objects they hold at any
depth, classes, closures, the functions that are called by name - and goes on using it after it has changed: a wrong
image, without an error. So all of it is recorded (`walk`), as a list of facts that can be compared, together with the
containers that hold it, by which it is quick to tell that nothing was touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

from harmonica_rt.model.identity import Contents, contents, first_change, put_back
from harmonica_rt.model.walk import BY_TEXT, CLOSED, SCALARS, Walk, package_of

TOLD = 5  # the most changes that a message names


class Facts:
    """A snapshot of what a model's forward may take for granted.

    Attributes:
        containers: the objects that hold the facts, for `identity.first_change`.
        noted: the contents of each container, at the snapshot.
        versions: scratch memory for the containers' versions, for `identity.first_change`.
        tensors: the plain tensors among the facts: those that are neither parameters nor buffers of the model.
        hidden: the objects whose state no container shows (arrays, random generators, iterators), each with its state
            at the snapshot.
        untold: descriptions of objects whose state cannot be read at all.
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
        """Whether a graph captured under these facts holds under `other`."""
        return self._values == other._values

    def differences(self, other: Facts) -> Iterator[str]:
        """Descriptions of how `other` differs, the first difference first."""
        mine, theirs = self._by_place(), other._by_place()
        for place in {**theirs, **mine}:
            before, now = mine.get(place), theirs.get(place)
            if before != now:
                yield _told(place, before, now)

    def changes(self, model: nn.Module) -> tuple[str, ...]:
        """Descriptions of how the model differs now; at most `TOLD` of them."""
        if first_change(self.containers, self.noted) < 0 and self.hidden_hold():
            return ()
        return tuple(itertools.islice(self.differences(Facts(model)), TOLD))

    def code(self) -> list[Any]:
        """The containers that are code of the model's packages: classes, and functions without closures."""
        kinds = (type, FunctionType)
        found = [held for held in self.containers if isinstance(held, kinds) and package_of(held) not in CLOSED]
        return [held for held in found if not getattr(held, "__closure__", None)]

    def hidden_hold(self) -> bool:
        """Whether all hidden state is as it was at the snapshot."""
        return all(hidden.tell() == told for hidden, told in self.hidden)

    def let_go(self) -> None:
        """Keep what can be compared with other facts, and release the objects that were inspected.

        The containers and their contents hold weights, which the model may have dropped while a plan keeps its facts.
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
        """Restore everything to the snapshot, and clear the `lru_cache`s that got new entries since.

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
