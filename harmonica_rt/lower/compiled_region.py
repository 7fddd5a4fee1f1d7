"""Compiles a region with Inductor.

Hazard: compiled code takes the strides and dtypes of its example inputs for granted and would misread any others. But
hoisted values may come out of a batched pass with other strides, and operators may choose other strides than their fake
tensors have. So each call compares them and copies inputs with other strides; another dtype is an error. Shapes
cannot differ: signatures and parameters are compared before a step runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from harmonica_rt.errors import InvariantError, RegionError
from harmonica_rt.graph.layout import laid_out
from harmonica_rt.graph.rebuild import copy_of
from harmonica_rt.lower.regions import Region

# These override the user's settings: parameters stay arguments, the runtime records the CUDA graphs, nothing is
# autotuned, and layouts are already compared here.
OPTIONS = {"freezing": False, "triton.cudagraphs": False, "max_autotune": False, "size_asserts": False}


class CompiledRegion:
    """A compiled region: called with its inputs, it returns its results.

    Args:
        region: the region.
        name: its `__name__`, since graphs call their functions by name.
        written: number of inputs that it writes into; these are the last ones.

    Raises:
        RegionError: it cannot be compiled.
    """

    def __init__(self, region: Region, name: str, *, written: int = 0) -> None:
        self.__name__ = name
        self._strides = [value.stride() for value in region.inputs]
        self._read_only = len(region.inputs) - written
        self._dtypes = [value.dtype for value in region.inputs]
        self._run = _compile(region)

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Run the region.

        Raises:
            InvariantError: an input has another dtype, or one that is written into has other strides.
        """
        for value, dtype in zip(inputs, self._dtypes, strict=True):
            if value.dtype is not dtype:
                raise InvariantError(f"{self.__name__} was compiled for {dtype} and given {value.dtype}")
        laid = [laid_out(value, strides) for value, strides in zip(inputs, self._strides, strict=True)]
        if any(a is not b for a, b in zip(laid[self._read_only :], inputs[self._read_only :], strict=True)):
            raise InvariantError(f"{self.__name__} was given memory to write into with other strides than compiled for")
        return self._run(*laid)


def _compile(region: Region) -> Callable[..., Sequence[torch.Tensor]]:
    import torch._inductor  # heavy, so imported only when it is used

    graph = copy_of(region.graph)  # Inductor may change what it is given
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit.*")  # torch's own use
        warnings.filterwarnings("ignore", message=".*TensorFloat32.*")  # advises less precision than the reference has
        with FakeTensorMode(shape_env=ShapeEnv()):  # without a shape_env, nothing is cached on disk
            examples: list[Any] = [
                torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
                for value in region.inputs
            ]
        try:
            compiled: Callable[..., Sequence[torch.Tensor]] = torch._inductor.compile(
                fx.GraphModule({}, graph, "Region"), examples, OPTIONS
            )
        except RuntimeError as error:
            raise RegionError(
                f"Inductor cannot compile {region.origin}: {_reason(error)}. Use lowering='fused' instead"
            ) from error
    return compiled


def _reason(error: RuntimeError) -> str:
    """The first line of a message, and the operator that it names further down, if any."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return ", ".join((lines[0], *(line for line in lines[1:] if line.startswith("target:"))))
