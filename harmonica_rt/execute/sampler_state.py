"""The memory of a run with a linear sampler, and the launches that compute the next latents in it.

The same launches serve a run that goes step by step and one that is recorded as a CUDA graph: both give the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from harmonica_rt.errors import SamplerError
from harmonica_rt.execute.sampler import Sampler, state_dtype


class SamplerState:
    """The memory of a run with a linear sampler; all of it stays at its address.

    Args:
        sampler: a run of the kind that the memory is for.
    """

    def __init__(self, sampler: Sampler) -> None:
        latents, rows = sampler.latents, len(sampler.rows)
        self._of = dataclasses.replace(sampler, latents=torch.empty_like(latents, device="meta"))  # keeps no values
        self._loaded: tuple[tuple[float, ...], NDArray[np.float64]] | None = None
        dtype, device = state_dtype(latents), latents.device
        with torch.inference_mode(False), torch.no_grad():
            # x and m of row r lie at 2p and 2p + 1, p = r mod depth
            self._history = torch.empty(2 * sampler.table.depth, *latents.shape, dtype=dtype, device=device)
            self._products = torch.empty_like(self._history)
            self._rows = torch.empty(rows, sampler.rows.shape[1], dtype=dtype, device=device)
            steps = sampler.first + rows
            self.timesteps = torch.empty(steps, sampler.batch, dtype=sampler.timestep_dtype, device=device)

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """All of it. `timesteps`, `[steps, B]`, is what the model is given in every step of the schedule."""
        yield from (self._history, self._products, self._rows, self.timesteps)

    @torch.no_grad()
    def load(self, sampler: Sampler) -> None:
        """Begin a run: of the same kind as the sampler that the memory was made for."""
        last, self._loaded = self._loaded, None
        if last is None or last[0] != sampler.timesteps or not np.array_equal(last[1], sampler.rows):
            self._rows.copy_(torch.from_numpy(sampler.rows))
            each = (*(sampler.timesteps[:1] * sampler.first), *sampler.timesteps)
            self.timesteps.copy_(torch.tensor(each, device="cpu", dtype=sampler.timestep_dtype)[:, None])
        self._history[0].copy_(sampler.latents)
        self._loaded = sampler.timesteps, sampler.rows

    def rehearse(self) -> None:
        """Launch what runs launch, on whatever the memory holds, so that recording it finds everything loaded."""
        for row in range(min(len(self._rows), self._of.table.depth)):
            self.advance(row, torch.zeros_like(self.model_input(row)))

    @torch.no_grad()
    def model_input(self, row: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """What the model is given in a row, `[B, C, ...]`."""
        sampler, latents = self._of, self._latents(row)
        if sampler.scales_input:
            latents = latents * self._rows[row, -2]
        if out is None:
            given = sampler.latents
            out = torch.empty(sampler.batch, *given.shape[1:], dtype=given.dtype, device=latents.device)
        for half in (out,) if sampler.guidance is None else out.chunk(2):
            half.copy_(latents)
        return out

    def timestep(self, row: int) -> torch.Tensor:
        """The timestep of a row, `[B]`."""
        return self.timesteps[self._of.first + row, :1].expand(self._of.batch)

    @torch.no_grad()
    def advance(self, row: int, prediction: torch.Tensor) -> None:
        """Compute the next latents.

        Args:
            row: the row that the model was called in.
            prediction: what it gave, `[B, C, ...]`; further channels (a learned variance) are left out.

        Raises:
            SamplerError: it does not have the shape of the latents.
        """
        depth, count = self._of.table.depth, 2 * min(row + 1, self._of.table.depth)
        self._note(row, self._fitting(prediction))
        weights = self._rows[row, :count].view(-1, *(1 for _ in self._of.latents.shape))
        torch.mul(self._history[:count], weights, out=self._products[:count])
        torch.sum(self._products[:count], 0, out=self._history[2 * ((row + 1) % depth)])

    def result(self) -> torch.Tensor:
        """The latents after the last row, in the dtype of the first."""
        latents = self._latents(len(self._rows))
        return torch.empty_like(latents, dtype=self._of.latents.dtype).copy_(latents)

    def _latents(self, row: int) -> torch.Tensor:
        return self._history[2 * (row % self._of.table.depth)]

    def _note(self, row: int, prediction: torch.Tensor) -> None:
        """Keep the model's output, guided if it is to be."""
        kept = self._history[2 * (row % self._of.table.depth) + 1]
        if self._of.guidance is None:
            kept.copy_(prediction)
            return
        one, other = prediction.to(kept.dtype).chunk(2)
        conditional, unconditional = (one, other) if self._of.conditional_first else (other, one)
        torch.add(unconditional, (conditional - unconditional) * self._rows[row, -1], out=kept)

    def _fitting(self, prediction: torch.Tensor) -> torch.Tensor:
        batch, channels, *rest = self._of.batch, *self._of.latents.shape[1:]
        if prediction.dim() > 1 and prediction.shape[1] > channels:
            prediction = prediction[:, :channels]
        if prediction.shape != (batch, channels, *rest):
            raise SamplerError(
                f"the model returned {list(prediction.shape)} for latents {[batch, channels, *rest]}; sample() needs "
                "an output of the shape of the latents, which may have further channels in dimension 1"
            )
        return prediction
