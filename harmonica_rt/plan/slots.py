"""Gives every stored value a place in one arena per device, so that values alive at the same time never overlap.

A lifetime is closed at both ends (a slot read in a step may not be overwritten in that step), so placement is an
interval packing problem. For equal sizes, taking the lowest free place in order of birth is optimal: the arena is as
large as the most bytes ever alive at once. For unequal sizes the problem is NP-hard; several orders are tried and the
best is kept. Unless this costs memory, a site returns to the place it had before if that is free: CUDA graphs hold
addresses, so fewer of them have to be recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from harmonica_rt.errors import InvariantError
from harmonica_rt.graph.layout import extent
from harmonica_rt.indices import SiteOutput, SlotId, StepIndex

ALIGNMENT = 64  # bytes; a cache line, and more than any vector load needs


@dataclass(frozen=True)
class Value:
    """A value to place: its site output, the first and last step in which it is alive, and its layout."""

    output: SiteOutput
    first: StepIndex
    last: StepIndex
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """Bytes it takes in an arena: its extent, rounded up to the alignment."""
        return -(-self.extent // ALIGNMENT) * ALIGNMENT

    @property
    def extent(self) -> int:
        """Bytes from its first to its last element, gaps between strides included."""
        return extent(self.shape, self.stride) * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """A value with its place: `offset` bytes into the arena of its device."""

    id: SlotId
    value: Value
    offset: int


@dataclass(frozen=True)
class SlotTable:
    """All slots of a plan, the size of each device's arena, and the bound that no packing can beat (both in bytes)."""

    slots: tuple[Slot, ...]
    arena_bytes: dict[torch.device, int]
    lower_bound: dict[torch.device, int]

    @property
    def site_addresses_bytes(self) -> int:
        """Bytes that an arena would take if the values of each site output had addresses of their own all along."""
        values: dict[SiteOutput, list[Value]] = {}
        for slot in self.slots:
            values.setdefault(slot.value.output, []).append(slot.value)
        return sum(map(most_alive, values.values()))


def place(values: Sequence[Value]) -> SlotTable:
    """Place all values; slots keep the order of `values`."""
    offsets = [0] * len(values)
    for device in dict.fromkeys(value.device for value in values):
        members = [index for index, value in enumerate(values) if value.device == device]
        chosen = _pack([values[index] for index in members])
        for index, offset in zip(members, chosen, strict=True):
            offsets[index] = offset
    return placed(values, offsets)


def placed(values: Sequence[Value], offsets: Sequence[int]) -> SlotTable:
    """The table of values at chosen places: `offsets` are bytes into the arena of each value's device.

    Raises:
        InvariantError: the number of places is not the number of values.
    """
    if len(offsets) != len(values):
        raise InvariantError(f"{len(offsets)} places for {len(values)} slots")
    slots = tuple(Slot(SlotId(i), v, offset) for i, (v, offset) in enumerate(zip(values, offsets, strict=True)))
    on: dict[torch.device, list[Slot]] = {}
    for slot in slots:
        on.setdefault(slot.value.device, []).append(slot)
    return SlotTable(
        slots,
        {device: max(slot.value.size + slot.offset for slot in members) for device, members in on.items()},
        {device: most_alive([slot.value for slot in members]) for device, members in on.items()},
    )


def most_alive(values: Sequence[Value]) -> int:
    """Bytes of the largest set of values alive in one step: no arena can be smaller."""
    changes: dict[int, int] = {}  # step -> growth of the bytes alive
    for value in values:
        changes[value.first] = changes.get(value.first, 0) + value.size
        changes[value.last + 1] = changes.get(value.last + 1, 0) - value.size
    alive = peak = 0
    for step in sorted(changes):
        alive += changes[step]
        peak = max(peak, alive)
    return peak


_Order = Callable[[Value], tuple[int, ...]]

_ORDERS: tuple[_Order, ...] = (
    lambda v: (v.first, -v.size),  # by birth: optimal for equal sizes
    lambda v: (-v.size, v.first),  # the largest first
    lambda v: (-v.size * (v.last - v.first + 1), v.first),  # the largest product of size and lifetime first
    lambda v: (-(v.last - v.first), -v.size, v.first),  # the longest lifetime first
)


def _pack(values: list[Value]) -> list[int]:
    """Offsets of the best packing found."""
    bound = most_alive(values)
    best: list[int] = []
    best_size = -1
    for keep_home, order in itertools.product((True, False), _ORDERS):
        offsets = _first_fit(values, sorted(range(len(values)), key=lambda i: order(values[i])), keep_home)
        size = max(offset + value.size for offset, value in zip(offsets, values, strict=True))
        if best_size < 0 or size < best_size:
            best, best_size = offsets, size
        if best_size == bound:
            break
    return best


def _first_fit(values: list[Value], order: list[int], keep_home: bool) -> list[int]:
    """Place values in the given order as low as possible, or with `keep_home` where the site was before, if free."""
    offsets = [0] * len(values)
    alive: dict[int, list[int]] = {}  # step -> the values placed so far that are alive in it
    home: dict[SiteOutput, int] = {}
    top = 0
    for index in order:
        value = values[index]
        neighbours = {other for step in range(value.first, value.last + 1) for other in alive.get(step, ())}
        taken = sorted((offsets[other], offsets[other] + values[other].size) for other in neighbours)
        preferred = home.get(value.output) if keep_home else None
        if preferred is not None and preferred + value.size <= top and _is_free(preferred, value.size, taken):
            offsets[index] = preferred
        else:
            offsets[index] = _lowest_gap(value.size, taken)
        home.setdefault(value.output, offsets[index])
        top = max(top, offsets[index] + value.size)
        for step in range(value.first, value.last + 1):
            alive.setdefault(step, []).append(index)
    return offsets


def _is_free(offset: int, size: int, taken: list[tuple[int, int]]) -> bool:
    return all(offset + size <= start or end <= offset for start, end in taken)


def _lowest_gap(size: int, taken: list[tuple[int, int]]) -> int:
    offset = 0
    for start, end in taken:
        if start - offset >= size:
            return offset
        offset = max(offset, end)
    return offset
