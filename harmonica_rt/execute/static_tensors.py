"""Tensors at fixed addresses: changing values are copied into them, and CUDA graphs read them there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from harmonica_rt.graph.layout import distinct, extent
from harmonica_rt.indices import StepIndex

ALIGNMENT = 64  # bytes

_Kind = tuple[torch.dtype, torch.device]


class StaticTensors:
    """One tensor at a fixed address per name, with the layout of the first value given under that name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(distinct(tensor).nbytes for tensor in self.tensors.values())

    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Copy each value to the tensor of its name; one call per dtype, which takes few launches on a GPU."""
        copied: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for name, value in values.items():
            if name not in self.tensors:
                self.tensors[name] = _empty(value)
            target = self.tensors[name]
            targets, sources = copied.setdefault(value.dtype, ([], []))
            targets.append(distinct(target))
            sources.append(distinct(value, target))
        for targets, sources in copied.values():
            torch._foreach_copy_(targets, sources)


class StaticRows:
    """Per-step values, packed so that one copy per dtype and device loads a whole step.

    Args:
        examples: the values of one step; all steps have their layout. Views of one tensor share memory here too.
    """

    def __init__(self, examples: Mapping[str, torch.Tensor]) -> None:
        owners: dict[tuple[_Kind, int], list[str]] = {}
        for name, value in examples.items():
            owners.setdefault((_kind(value), value.untyped_storage().data_ptr()), []).append(name)
        self._places: dict[str, tuple[_Kind, int]] = {}  # name -> kind, first element
        sizes: dict[_Kind, int] = {}
        for (kind, _), names in owners.items():
            start, unit = sizes.get(kind, 0), ALIGNMENT // kind[0].itemsize
            first = min(int(examples[name].storage_offset()) for name in names)
            last = max(_end(examples[name]) for name in names)
            for name in names:
                self._places[name] = (kind, start + int(examples[name].storage_offset()) - first)
            sizes[kind] = start + -(-(last - first) // unit) * unit
        with torch.inference_mode(False), torch.no_grad():
            self._row = {kind: torch.empty(size, dtype=kind[0], device=kind[1]) for kind, size in sizes.items()}
            self.tensors = {
                name: self._row[kind].as_strided(examples[name].shape, examples[name].stride(), start)
                for name, (kind, start) in self._places.items()
            }
        self._table: dict[_Kind, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the row and of the table."""
        return sum(tensor.nbytes for tensor in self.owned)

    @property
    def owned(self) -> tuple[torch.Tensor, ...]:
        """The row and the table."""
        return (*self._row.values(), *self._table.values())

    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Load the given values of a step, without the table."""
        names = list(values)
        for kind in self._row:
            chosen = [name for name in names if self._places[name][0] == kind]
            targets = [self.tensors[name] for name in chosen]
            torch._foreach_copy_(
                [distinct(target) for target in targets],
                [distinct(values[name], target) for name, target in zip(chosen, targets, strict=True)],
            )

    def tabulate(self, names: Sequence[str], stacked: Sequence[torch.Tensor]) -> None:
        """Keep the values of all steps, `[steps, ...]` each, for `select`."""
        steps = stacked[0].shape[0]
        for kind, row in self._row.items():
            if kind not in self._table or self._table[kind].shape[0] != steps:
                with torch.inference_mode(False), torch.no_grad():
                    self._table[kind] = row.new_empty((steps, row.numel()))
        for name, values in zip(names, stacked, strict=True):
            kind, start = self._places[name]
            table, one = self._table[kind], self.tensors[name]
            column = table.as_strided((steps, *one.shape), (table.shape[1], *one.stride()), start)
            distinct(column).copy_(distinct(values, column))

    def select(self, step: int) -> None:
        """Load the values of a step from the table."""
        for kind, row in self._row.items():
            row.copy_(self._table[kind][step])


class HoistedMemory:
    """The hoisted values of one stream at a time, at fixed addresses."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._once = StaticTensors()
        self._each: StaticRows | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self._once.nbytes + (self._each.nbytes if self._each is not None else 0)

    @property
    def owned(self) -> Iterator[torch.Tensor]:
        """The tensors that own the memory of all values."""
        yield from self._once.tensors.values()
        if self._each is not None:
            yield from self._each.owned

    def begin(
        self, once: Mapping[str, torch.Tensor], each: Sequence[str], steps: tuple[torch.Tensor, ...] | None
    ) -> None:
        """Store the values of a request, and those of all its steps where they are known.

        Args:
            once: the values of the request by name.
            each: names of the values that differ from step to step.
            steps: those values, `[steps, ...]` each; None if they are not known yet.
        """
        self._once.put(once)
        self.tensors.update(self._once.tensors)
        if steps is not None:
            self._rows({name: value[0] for name, value in zip(each, steps, strict=True)}).tabulate(each, steps)

    def select(self, step: StepIndex) -> dict[str, torch.Tensor]:
        """All values, after loading those of `step`."""
        if self._each is not None:
            self._each.select(step)
        return self.tensors

    def put(self, each: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All values, after loading the given ones of a step."""
        self._rows(each).put(each)
        return self.tensors

    def _rows(self, examples: Mapping[str, torch.Tensor]) -> StaticRows:
        if self._each is None:
            self._each = StaticRows(examples)
            self.tensors.update(self._each.tensors)
        return self._each


def _kind(value: torch.Tensor) -> _Kind:
    return value.dtype, value.device


def _empty(value: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _end(value: torch.Tensor) -> int:
    """Index into the storage, one past the last element of the tensor."""
    return int(value.storage_offset()) + extent(value.shape, value.stride())
