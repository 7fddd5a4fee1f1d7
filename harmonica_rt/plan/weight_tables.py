"""The weights of a plan's steps as tensors, one table per device that holds values of weighted sites."""

from __future__ import annotations

import torch

from harmonica_rt.plan.histories import histories
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.specialise import weights_name
from harmonica_rt.schedule.weights import MOST_WEIGHTS


def weight_tables(plan: Plan) -> dict[str, torch.Tensor]:
    """Float32 `[steps, sites, 4]` by the name that step graphs take a step's row by; empty if no site is weighted."""
    history = histories(plan.schedule)
    devices = {slot.value.device for slot in plan.table.slots if history.taken[slot.value.output.site]}
    with torch.inference_mode(False), torch.no_grad():
        weights = torch.from_numpy(history.weights).float()
        padded = torch.nn.functional.pad(weights, (0, MOST_WEIGHTS - weights.shape[2]))
        return {weights_name(device): padded.to(device) for device in sorted(devices, key=str)}
