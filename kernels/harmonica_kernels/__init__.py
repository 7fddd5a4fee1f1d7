"""The fused operators of harmonica-rt: one schema each, and an implementation per device.

`reference.py` of an op is its definition (PyTorch, fp32 arithmetic for half types, one downcast). On the CPU
the C++ extension `_C` runs in its place when it was built; on CUDA the reference runs until the op has a
Triton kernel. Importing this package registers the ops as `torch.ops.harmonica.*`; it imports nothing heavy
besides torch.
"""

from harmonica_kernels._build import BuildInfo, build_info
from harmonica_kernels.gated_residual import gated_residual

__all__ = ["BuildInfo", "build_info", "gated_residual"]
