"""What a model's forward may take for granted: all that it can use besides its arguments and its parameters' values.

Hazard: a captured graph bakes in whatever Python looked up during the trace - attributes, the objects they hold at any
depth, classes, closures, the functions that are called by name - and keeps using it after it has changed, which gives a
wrong image without an error. So all of it is recorded (`walk`), as a table of facts that can be compared, together with
the containers that hold it, which show quickly whether anything was touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

from harmonica_rt.model.identity import Contents, contents, first_change, put_back
from harmonica_rt.model.scope import CLOSED, package_of
from harmonica_rt.model.walk import walk

MOST_CHANGES = 5  # named in one message


class Facts:
    """A snapshot of what a model's forward may take for granted.

    Attributes:
        containers: the objects that hold the facts, for `identity.first_change`.
        noted: the contents of each container, at the snapshot.
        versions: scratch memory for the containers' versions, for `identity.first_change`.
        tensors: the plain tensors among the facts: those that are neither parameters nor buffers of the model.
        hidden: the objects whose state no container shows (arrays, random generators, iterators), each with its state
            at the snapshot.
        opaque: descriptions of objects whose state cannot be found out.
    """

    def __init__(self, model: nn.Module) -> None:
        found = walk(model)
        self.containers = found.containers
        self.noted: list[Contents] = list(map(contents, self.containers))
        self.versions = bytearray(8 * len(self.containers))
        self.tensors = tuple(found.tensors)
        self.hidden = tuple(found.hidden)
        self.opaque = tuple(found.opaque)
        self._caches = [(cache, cache.cache_info().misses) for cache in found.caches]
        self._table = found.facts

    def same_as(self, other: Facts) -> bool:
        """Whether a graph captured under these facts holds under `other`."""
        return self._table.same_as(other._table)

    def differences(self, other: Facts) -> Iterator[str]:
        """Descriptions of how `other` differs, the first difference first."""
        return self._table.differences(other._table)

    def changes(self, model: nn.Module) -> tuple[str, ...]:
        """Descriptions of how the model differs now; at most `MOST_CHANGES`."""
        if first_change(self.containers, self.noted) < 0 and self.hidden_hold():
            return ()
        return tuple(itertools.islice(self.differences(Facts(model)), MOST_CHANGES))

    def code(self) -> list[Any]:
        """The containers that are code of the model's packages: classes, and functions without closures."""
        kinds = (type, FunctionType)
        found = [held for held in self.containers if isinstance(held, kinds) and package_of(held) not in CLOSED]
        return [held for held in found if not getattr(held, "__closure__", None)]

    def hidden_hold(self) -> bool:
        """Whether all hidden state is as it was at the snapshot."""
        return all(hidden.get() == state for hidden, state in self.hidden)

    def let_go(self) -> None:
        """Keep what can be compared with other facts, and release the objects that were inspected.

        The containers and their contents hold tensors, which the model may have dropped while a plan keeps its facts.
        """
        self.containers, self.noted = [], []
        self.tensors, self.hidden, self._caches = (), (), []

    def put_back(self) -> None:
        """Restore everything to the snapshot, and clear the `lru_cache`s that got new entries since.

        Otherwise the model would keep tensors without values, which a trace leaves behind.
        """
        changed = first_change(self.containers, self.noted)
        for index in range(changed, len(self.containers)) if changed >= 0 else ():
            put_back(self.containers[index], self.noted[index])
        for hidden, state in self.hidden:
            if hidden.restore is not None and hidden.get() != state:
                hidden.restore(state)
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()
