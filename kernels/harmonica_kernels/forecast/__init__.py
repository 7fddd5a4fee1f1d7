"""`sum_k w_k * cache_k`: a value forecast from earlier ones, where no residual connection adds it."""

from harmonica_kernels.forecast.op import forecast

__all__ = ["forecast"]
