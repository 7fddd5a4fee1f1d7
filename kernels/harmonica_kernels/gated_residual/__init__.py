"""`x + gate * y`: the residual connection of a DiT sub-layer."""

from harmonica_kernels.gated_residual.op import gated_residual

__all__ = ["gated_residual"]
