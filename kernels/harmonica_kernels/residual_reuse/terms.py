"""The terms of a residual sum, by where they lie in the memory of a call, as its launches take them apart."""

from __future__ import annotations

import itertools
from typing import NamedTuple


class Entry(NamedTuple):
    """One y, a sum of caches, with its gate.

    Attributes:
        caches: indices in the memory of a call.
        gate: index in it; None for none. The tensor there may be None too.
        places: of the weights of the caches; empty if there are none.
    """

    caches: range
    gate: int | None
    places: tuple[int, ...]


class Terms(NamedTuple):
    """A residual sum.

    Attributes:
        x: index in the memory of a call; None where nothing stands before the terms.
        entries: what is added, in order.
        weights: index of the flattened weights.
    """

    x: int | None
    entries: tuple[Entry, ...]
    weights: int

    @classmethod
    def after_x(cls, caches: int, counts: tuple[int, ...], places: tuple[int, ...], weights: int) -> Terms:
        """The terms of a call whose memory begins with x, the caches and their gates, `counts` caches per gate."""
        ends = itertools.accumulate(counts)
        entries = (
            Entry(range(1 + end - count, 1 + end), 1 + caches + index, places[end - count : end])
            for index, (count, end) in enumerate(zip(counts, ends, strict=True))
        )
        return cls(0, tuple(entries), weights)

    @property
    def length(self) -> int:
        """Number of caches."""
        return sum(len(entry.caches) for entry in self.entries)

    @property
    def longest(self) -> int:
        """Number of caches of the entry that has most."""
        return max(len(entry.caches) for entry in self.entries)

    @property
    def operands(self) -> list[int | None]:
        """The indices of x, of the caches, and one gate per cache: that of an entry comes with its last cache."""
        caches = [index for entry in self.entries for index in entry.caches]
        gates = [gate for entry in self.entries for gate in (*[None] * (len(entry.caches) - 1), entry.gate)]
        return [self.x, *caches, *gates]

    @property
    def joined(self) -> int:
        """A number with bit k set if the k-th cache belongs to the entry of the one before it."""
        bits = (index > 0 for entry in self.entries for index in range(len(entry.caches)))
        return sum(bit << k for k, bit in enumerate(bits))

    @property
    def codes(self) -> tuple[int, ...] | None:
        """The places as the kernels take them; None without weights.

        Triton compiles another kernel for a number that is 1 or a multiple of 16, and 4 * place + 2 never is.
        """
        return tuple(4 * place + 2 for entry in self.entries for place in entry.places) or None

    def split(self, most: int) -> tuple[Terms, Terms | None]:
        """The first entries, with at most so many caches, and the others if there are any."""
        ends = itertools.accumulate(len(entry.caches) for entry in self.entries)
        fitting = sum(end <= most for end in ends)
        first, others = self.entries[:fitting], self.entries[fitting:]
        return self._replace(entries=first), self._replace(entries=others) if others else None
