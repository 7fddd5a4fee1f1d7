"""What a walk over a model has found so far, and what it has yet to visit. `facts` makes a snapshot of the findings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from harmonica_rt.model.fact_table import FactTable
from harmonica_rt.model.hidden_state import Hidden


@dataclass(frozen=True)
class Findings:
    """All that a walk finds.

    Attributes:
        facts: what can be compared with the findings of another walk.
        containers: the objects that hold the facts, for `identity.first_change`.
        tensors: the plain tensors among the facts: those that are neither parameters nor buffers of the model.
        hidden: the objects whose state no container shows (arrays, random generators, iterators), each with its state.
        opaque: descriptions of objects whose state cannot be found out.
        caches: the `lru_cache`s that a forward may fill.
    """

    facts: FactTable = field(default_factory=FactTable)
    containers: list[Any] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    hidden: list[tuple[Hidden, Any]] = field(default_factory=list)
    opaque: list[str] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)


class Agenda:
    """The objects that a walk has visited, and those that it has yet to visit, the next one last."""

    def __init__(self) -> None:
        self.fact_of: dict[int, int] = {}  # id of an object -> index of its fact
        self._kept: list[Any] = []  # visited objects, kept alive so that their ids stay unique
        self._pending: list[tuple[int, str, Any]] = []

    def enter(self, value: Any, fact: int) -> None:
        """Record that an object is visited, as the fact with this index."""
        self.fact_of[id(value)] = fact
        self._kept.append(value)

    def later(self, parent: int, children: list[tuple[str, Any]]) -> None:
        """Visit the children of a fact next, in this order."""
        self._pending += [(parent, name, value) for name, value in reversed(children)]

    def next(self) -> tuple[int, str, Any] | None:
        """Take the next visit: its parent fact, its name and the object; None if the walk is over."""
        return self._pending.pop() if self._pending else None
