"""The fused operators of harmonica-rt; each has one schema, and one implementation per device.

An op's `reference.py` is its definition (PyTorch, fp32 arithmetic for half types, one downcast). On the CPU, the C++
extension `_C` runs instead if it was built; on CUDA, the op's Triton kernel runs instead if Triton is installed.
Importing this package registers the ops as `torch.ops.harmonica.*`; it imports nothing heavy besides torch.

Reading order: a folder per op, `residual_reuse` first (`reference`, `op`, `terms`, `triton`), then what the folders
share: `_library` (registers an op), `_checks` (of arguments), `_triton` (tensors as rows), `_launch` (launches),
`_build` (loads `_C`, which is built from `csrc/`); `ahead_of_time` compiles the kernels of calls to come; `resources`
shows the registers that the Triton kernels need.
"""

from harmonica_kernels._build import BuildInfo, build_info, extension_module
from harmonica_kernels.forecast import forecast
from harmonica_kernels.gated_residual import gated_residual
from harmonica_kernels.norm_rotary import norm_rotary
from harmonica_kernels.residual_reuse import residual_reuse
from harmonica_kernels.residual_reuse_norm_modulate import residual_reuse_norm_modulate

__all__ = [
    "BuildInfo",
    "build_info",
    "extension_module",
    "forecast",
    "gated_residual",
    "norm_rotary",
    "residual_reuse",
    "residual_reuse_norm_modulate",
]
