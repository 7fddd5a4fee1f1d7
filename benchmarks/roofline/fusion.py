"""What Inductor makes of a region: products as they are, and everything between them in few kernels.

The rule, in place of compiling for a GPU. Within a region, an operator that only moves memory joins the kernel of one
that reads its result, if no product lies on a way between them and if
- it works element by element (Inductor inlines it into what reads it), or
- it is a reduction, such as a norm, and the reader goes over as many elements.
What works element by element and is read by one kernel alone joins that even across products: it is computed there.
The joined kernel reads each of its inputs once, and writes only what is read outside of it. Products, convolutions,
attentions and harmonica operators stay kernels of their own; the bias of a convolution is joined. Inductor also joins
kernels that merely read the same memory, so the number of kernels here is an upper bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from benchmarks.roofline.kernel import Access, Kernel, Kind

REDUCTIONS = ("native_layer_norm", "rms_norm", "mean", "sum", "var_mean", "_softmax", "amax")


def fused(kernels: Sequence[Kernel], kept: Collection[int]) -> list[Kernel]:
    """The kernels with those of each region joined.

    Args:
        kernels: all kernels of a program, in order.
        kept: buffers that are read after the program: results and slots.
    """
    readers: dict[int, set[int]] = {}
    for index, kernel in enumerate(kernels):
        for access in kernel.reads:
            readers.setdefault(access.buffer, set()).add(index)
    found: list[Kernel] = []
    for region, listed in itertools.groupby(enumerate(kernels), key=lambda each: each[1].region):
        members = dict(listed)
        if region is None:
            found += members.values()
            continue
        for group in _sunk(_groups(members), members, readers, kept):
            made = {access.buffer for index in group for access in members[index].writes}
            outside = {buffer for buffer in made if buffer in kept or readers.get(buffer, set()) - set(group)}
            found.append(_joined([members[index] for index in group], outside))
    return found


def _groups(members: dict[int, Kernel]) -> list[list[int]]:
    """The kernels of a region, grouped into those that become one; in order of the first of each group."""
    writers: dict[int, list[int]] = {}
    levels: dict[int, int] = {}  # the number of products on the longest way to a kernel
    leader = {index: index for index in members}

    def lead(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    for index, kernel in members.items():
        sources = [source for access in kernel.reads for source in writers.get(access.buffer, [])]
        levels[index] = max((levels[s] + (members[s].kind is not Kind.MEMORY) for s in sources), default=0)
        for source in sources:
            if levels[source] == levels[index] and _joins(members[source], kernel):
                first, last = sorted((lead(source), lead(index)))
                leader[last] = first
        for access in kernel.writes:
            writers.setdefault(access.buffer, []).append(index)
    groups: dict[int, list[int]] = {}
    for index in members:
        groups.setdefault(lead(index), []).append(index)
    return list(groups.values())


def _sunk(
    groups: list[list[int]], members: dict[int, Kernel], readers: dict[int, set[int]], kept: Collection[int]
) -> list[list[int]]:
    """The groups, with each that has no reduction and one group of readers joined to that; last ones first."""
    of = {index: number for number, group in enumerate(groups) for index in group}
    for number in reversed(range(len(groups))):
        group = groups[number]
        made = {access.buffer for index in group for access in members[index].writes}
        reading = {of.get(reader) for buffer in made for reader in readers.get(buffer, ())} - {number}
        movable = all(members[i].kind is Kind.MEMORY and members[i].name not in REDUCTIONS for i in group)
        if not movable or len(reading) != 1 or not made.isdisjoint(kept):
            continue
        [target] = reading
        if target is None or any(members[index].kind is not Kind.MEMORY for index in groups[target]):
            continue
        groups[target] = sorted((*group, *groups[target]))
        groups[number] = []
        of |= dict.fromkeys(groups[target], target)
    return [group for group in groups if group]


def _joins(source: Kernel, reader: Kernel) -> bool:
    if source.kind is not Kind.MEMORY or reader.kind is not Kind.MEMORY:
        return False
    return source.name not in REDUCTIONS or _elements(source) == _elements(reader)


def _elements(kernel: Kernel) -> int:
    """The number of elements that a kernel goes over."""
    return max(math.prod(access.view[1]) for access in (*kernel.reads, *kernel.writes))


def _joined(group: list[Kernel], outside: Collection[int]) -> Kernel:
    """One kernel for all of a group.

    Args:
        group: the kernels.
        outside: the buffers that are read outside of the group.
    """
    if len(group) == 1:
        return group[0]
    made = {access.buffer for kernel in group for access in kernel.writes}
    reads = {(a.buffer, a.view): a for kernel in group for a in kernel.reads if a.buffer not in made}
    writes: dict[int, Access] = {}
    for access in (a for kernel in group for a in kernel.writes if a.buffer in outside):
        writes[access.buffer] = max(access, writes.get(access.buffer, access), key=lambda each: each.nbytes)
    names = " + ".join(dict.fromkeys(kernel.name for kernel in group))
    return replace(group[-1], name=names, reads=tuple(reads.values()), writes=tuple(writes.values()))
