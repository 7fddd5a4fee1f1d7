"""The memory of one stream: an arena per device, and the slots in it."""

from __future__ import annotations

from typing import Any

import torch

from harmonica_rt.graph.layout import distinct
from harmonica_rt.indices import StepIndex
from harmonica_rt.plan.plan import Plan

StepSlots = tuple[list[torch.Tensor], list[torch.Tensor]]  # the slots that a step reads, and those that it writes


class SlotBuffers:
    """Allocates an arena per device, and makes a tensor per slot that views its part of an arena."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        with torch.inference_mode(False), torch.no_grad():
            self.arenas = {
                device: torch.empty(size, dtype=torch.uint8, device=device)
                for device, size in plan.table.arena_bytes.items()
            }
            self.slots = [self._view(slot.value, slot.offset) for slot in plan.table.slots]
        self.steps: list[StepSlots] = [
            ([self.slots[slot] for slot in step.reads], [self.slots[slot] for slot in step.writes])
            for step in plan.steps
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the arenas."""
        return sum(arena.nbytes for arena in self.arenas.values())

    def poison_all(self) -> None:
        """Fill every slot with NaN (integers: their largest value)."""
        for slot in self.slots:
            _poison(slot)

    def poison_dead(self, step: StepIndex) -> None:
        """Fill the slots whose last read was in `step`, as `poison_all` does."""
        for slot in self._plan.table.slots:
            if slot.value.last == step:
                _poison(self.slots[slot.id])

    def _view(self, value: Any, offset: int) -> torch.Tensor:
        arena = self.arenas[value.device]
        flat = arena[offset : offset + value.extent].view(value.dtype)
        return flat.as_strided(value.shape, value.stride)


def _poison(slot: torch.Tensor) -> None:
    with torch.inference_mode(False), torch.no_grad():
        core = distinct(slot)
        if slot.dtype.is_floating_point or slot.dtype.is_complex:
            core.fill_(float("nan"))
        elif slot.dtype is torch.bool:
            core.fill_(True)
        else:
            core.fill_(torch.iinfo(slot.dtype).max)
