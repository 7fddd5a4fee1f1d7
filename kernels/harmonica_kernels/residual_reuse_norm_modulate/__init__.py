"""A sequence of reused residual connections, and the norm and modulation that begin the next computed sub-layer."""

from harmonica_kernels.residual_reuse_norm_modulate.op import residual_reuse_norm_modulate

__all__ = ["residual_reuse_norm_modulate"]
