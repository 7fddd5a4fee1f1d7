"""The definition of `residual_reuse`, with which every other implementation is compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_kernels._checks import check_residual_sum


def residual_reuse_reference(
    x: torch.Tensor, caches: Sequence[torch.Tensor], gates: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """out = x + sum_k gates[k] * caches[k], added up in the order of k.

    Arithmetic is fp32 for half types (fp64 for fp64), with one downcast at the end. Shapes, dtypes and errors are
    those of `harmonica_kernels.residual_reuse`.
    """
    check_residual_sum("residual_reuse", x, caches, gates)
    return residual_sum(x, caches, gates).to(x.dtype)


def residual_sum(x: torch.Tensor, caches: Sequence[torch.Tensor], gates: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The sum in the dtype of the arithmetic, before the downcast: fp32, or fp64 for fp64; contiguous.

    There is one multiplication and one addition per k, each rounded.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(wide)
    for cache, gate in zip(caches, gates, strict=True):
        total = total + (cache.to(wide) if gate is None else gate.to(wide) * cache.to(wide))
    return total.contiguous()
