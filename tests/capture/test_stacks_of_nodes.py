"""A refusal shows the line of the model that caused it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule
from tests.models import stack_call


class ReadsItsLatents(nn.Module):
    """Reads a value of the latents, which changes in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(8, 8)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        length = int(latents.sum().item())  # the line
        return self.site(latents) * length


@pytest.mark.usefixtures("stacks_of_nodes")
def test_a_refusal_shows_the_line_of_the_model() -> None:
    model = ReadsItsLatents().eval()
    compiled = hrt.compile(model, Schedule.every(2, steps=2, sites=["site"]), strict=True)
    with pytest.raises(hrt.CaptureError, match="depends on latents") as error:
        compiled(**stack_call(0))
    assert "length = int(latents.sum().item())  # the line" in str(error.value)
