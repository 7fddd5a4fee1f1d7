"""The tensors that `residual_reuse_norm_modulate` takes, as every implementation of it names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from harmonica_kernels._checks import check_broadcasts, check_residual_sum, check_width

_OP = "residual_reuse_norm_modulate"


class Operands(NamedTuple):
    """The operands of one call, as the op's schema and docstring have them; those after `shift` are given by name."""

    x: torch.Tensor
    caches: Sequence[torch.Tensor]
    gates: Sequence[torch.Tensor | None]
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    places: Sequence[int] = ()
    counts: Sequence[int] = ()

    @classmethod
    def checked(cls, *given: Any, **named: Any) -> Operands:
        """The operands of a call with these arguments, which may be given in order or by name.

        Raises:
            TypeError: a dtype is not fp32, bf16, fp16 or fp64, or the dtypes differ.
            ValueError: there are no caches, the numbers of gates, places or counts do not fit that of caches, there is
                no weight at a place, the shapes do not fit, or the tensors are on different devices.
        """
        operands = cls(*given, **named)
        operands.check()
        return operands

    def check(self) -> None:
        """Raise what `checked` raises."""
        x = self.x
        check_residual_sum(_OP, x, self.caches, self.gates, self.weights, self.places, self.counts)
        if x.ndim == 0:
            raise ValueError(f"{_OP}: x is a single number, expected [..., D]")
        check_width(_OP, x, "weight", self.weight)
        check_width(_OP, x, "bias", self.bias)
        check_broadcasts(_OP, x, "scale", self.scale)
        check_broadcasts(_OP, x, "shift", self.shift)
