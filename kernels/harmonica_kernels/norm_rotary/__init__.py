"""Norm and rotary embedding of queries and keys: what is done to them between their projections and the attention."""

from harmonica_kernels.norm_rotary.op import norm_rotary

__all__ = ["norm_rotary"]
