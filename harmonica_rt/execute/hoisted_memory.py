"""Hoisted values at fixed addresses: those of the request, and a table of those of all steps.

The values of the current step lie in a row of their own, which the graphs read. Graphs load it from the table by the
step number on the device, so that one graph serves many steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from harmonica_rt.execute.static_tensors import StaticTensors
from harmonica_rt.execute.step_counter import StepCounter
from harmonica_rt.graph.layout import distinct, extent
from harmonica_rt.indices import StepIndex

ALIGNMENT = 64  # bytes

_Kind = tuple[torch.dtype, torch.device]


class StaticRows:
    """Per-step values, packed so that one copy per dtype and device loads a whole step.

    Args:
        examples: the values of one step; all steps have their layout. Views of one tensor share its place.
        steps: the number of steps of a run.

    Attributes:
        tensors: the values of the current step by name: views of the row.
    """

    def __init__(self, examples: Mapping[str, torch.Tensor], steps: int) -> None:
        owners: dict[tuple[_Kind, int], list[str]] = {}
        for name, value in examples.items():
            owners.setdefault((_kind(value), value.untyped_storage().data_ptr()), []).append(name)
        self._owners = list(owners.values())  # names of the values that lie in one tensor
        self._places: dict[str, tuple[_Kind, int]] = {}  # name -> kind, first element
        sizes: dict[_Kind, int] = {}
        for (kind, _), names in owners.items():
            start, unit = sizes.get(kind, 0), ALIGNMENT // kind[0].itemsize
            # the elements of one storage, from the first to behind the last, that these values lie in
            first = min(int(examples[name].storage_offset()) for name in names)
            last = max(_end(examples[name]) for name in names)
            for name in names:
                self._places[name] = (kind, start + int(examples[name].storage_offset()) - first)
            sizes[kind] = start + -(-(last - first) // unit) * unit
        with torch.inference_mode(False), torch.no_grad():
            self._row = {kind: torch.empty(1, n, dtype=kind[0], device=kind[1]) for kind, n in sizes.items()}
            self._table = {kind: row.new_empty(steps, row.shape[1]) for kind, row in self._row.items()}
            self.tensors = {
                name: self._row[kind].as_strided(examples[name].shape, examples[name].stride(), start)
                for name, (kind, start) in self._places.items()
            }

    @property
    def nbytes(self) -> int:
        """Bytes of the row and of the table."""
        return sum(tensor.nbytes for tensor in self.owned)

    @property
    def owned(self) -> tuple[torch.Tensor, ...]:
        """The row and the table."""
        return (*self._row.values(), *self._table.values())

    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Write the values of one step to the row."""
        for kind in self._row:
            names = [name for name in values if self._places[name][0] == kind]
            targets = [self.tensors[name] for name in names]
            torch._foreach_copy_(
                [distinct(target) for target in targets],
                [distinct(values[name], target) for name, target in zip(names, targets, strict=True)],
            )

    def lies_on(self, device: torch.device) -> bool:
        """Whether all of it lies on `device`, so that `load` loads all of it."""
        return all(tensor.device == device for tensor in self.owned)

    def tabulate(self, names: Sequence[str], stacked: Sequence[torch.Tensor]) -> None:
        """Write the values of all steps, `[steps, ...]` each, to the table; views of one tensor by one copy."""
        given = dict(zip(names, stacked, strict=True))
        for owned in self._owners:
            group = {name: given[name] for name in owned}
            if len(group) > 1 and self._lie_as_in_row(group):
                self._tabulate_together(group)
            else:
                for name, values in group.items():
                    self._tabulate_one(name, values)

    def _lie_as_in_row(self, group: Mapping[str, torch.Tensor]) -> bool:
        """Whether values of all steps lie in one tensor, those of each step as their places lie in the row."""
        found = {
            (
                values.untyped_storage().data_ptr(),
                values.stride(0),
                int(values.storage_offset()) - self._places[name][1],
                values.stride()[1:] == self.tensors[name].stride(),
            )
            for name, values in group.items()
        }
        return len(found) == 1 and next(iter(found))[-1]

    def _tabulate_one(self, name: str, values: torch.Tensor) -> None:
        kind, start = self._places[name]
        table, one = self._table[kind], self.tensors[name]
        column = table.as_strided((len(table), *one.shape), (table.shape[1], *one.stride()), start)
        distinct(column).copy_(distinct(values, column))

    def _tabulate_together(self, group: Mapping[str, torch.Tensor]) -> None:
        """Copy the elements from the first to the last of these values, which lie in one tensor as in the row."""
        first = min(group, key=lambda name: self._places[name][1])
        kind, start = self._places[first]
        width = max(self._places[name][1] + extent(one.shape[1:], one.stride()[1:]) for name, one in group.items())
        table, source = self._table[kind], group[first]
        shape = (len(table), width - start)
        column = table.as_strided(shape, (table.shape[1], 1), start)
        column.copy_(source.as_strided(shape, (source.stride(0), 1), source.storage_offset()))

    def keep(self, step: StepIndex, counter: StepCounter) -> None:
        """Copy the row to its place in the table: by `counter` on the counter's device, elsewhere by `step`."""
        for kind, row in self._row.items():
            if kind[1] == counter.device:
                self._table[kind].index_copy_(0, counter.tensor, row)
            else:
                self._table[kind][step].copy_(row[0])

    def load(self, counter: StepCounter) -> None:
        """Load the row of the step that `counter` holds, where it lies on the counter's device."""
        for kind, row in self._row.items():
            if kind[1] == counter.device:
                torch.index_select(self._table[kind], 0, counter.tensor, out=row)

    def load_elsewhere(self, step: StepIndex, counter: StepCounter) -> None:
        """Load the row of `step` where it does not lie on the counter's device."""
        for kind, row in self._row.items():
            if kind[1] != counter.device:
                row[0].copy_(self._table[kind][step])


class HoistedMemory:
    """Hoisted values at fixed addresses, for one stream after another.

    Args:
        steps: the number of steps of a run.

    Attributes:
        tensors: all values by name, those of the current step among them.
    """

    def __init__(self, steps: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._steps = steps
        self._request = StaticTensors()
        self._rows: StaticRows | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self._request.nbytes + (self._rows.nbytes if self._rows is not None else 0)

    @property
    def owned(self) -> Iterator[torch.Tensor]:
        """The tensors whose memory holds all of them."""
        yield from self._request.tensors.values()
        if self._rows is not None:
            yield from self._rows.owned

    def lies_on(self, device: torch.device) -> bool:
        """Whether the values of all steps lie on `device`, so that `load` loads all of them."""
        return self._rows is None or self._rows.lies_on(device)

    def put_request(self, values: Mapping[str, torch.Tensor]) -> None:
        """Store the values of a request."""
        self._request.put(values)
        self.tensors.update(self._request.tensors)

    def put_joined(self, parts: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Store tensors that are made of several each, one below the other."""
        self._request.put_joined(parts)
        self.tensors.update(self._request.tensors)

    def put_steps(self, names: Sequence[str], stacked: Sequence[torch.Tensor]) -> None:
        """Store the values of all steps, `[steps, ...]` each."""
        self._like({name: values[0] for name, values in zip(names, stacked, strict=True)}).tabulate(names, stacked)

    def put_step(self, values: Mapping[str, torch.Tensor], step: StepIndex, counter: StepCounter) -> None:
        """Store the values of the step that `counter` holds, which is `step` (used where the counter cannot be)."""
        rows = self._like(values)
        rows.put(values)
        rows.keep(step, counter)

    def load(self, counter: StepCounter) -> None:
        """Load the values of the step that `counter` holds, as far as they lie on its device."""
        if self._rows is not None:
            self._rows.load(counter)

    def load_elsewhere(self, step: StepIndex, counter: StepCounter) -> None:
        """Load those values of `step` that do not lie on the counter's device."""
        if self._rows is not None:
            self._rows.load_elsewhere(step, counter)

    def _like(self, examples: Mapping[str, torch.Tensor]) -> StaticRows:
        """The rows; made for values like `examples` at the first call."""
        if self._rows is None:
            self._rows = StaticRows(examples, self._steps)
            self.tensors.update(self._rows.tensors)
        return self._rows


def _kind(value: torch.Tensor) -> _Kind:
    return value.dtype, value.device


def _end(value: torch.Tensor) -> int:
    """The element of its storage behind the last one of the tensor."""
    return int(value.storage_offset()) + extent(value.shape, value.stride())
