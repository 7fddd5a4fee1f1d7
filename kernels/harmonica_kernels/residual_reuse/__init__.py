"""`x + sum_k gate_k * cache_k`: a sequence of residual connections whose sub-layers are all reused."""

from harmonica_kernels.residual_reuse.op import residual_reuse

__all__ = ["residual_reuse"]
