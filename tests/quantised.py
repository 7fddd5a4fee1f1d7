"""Linear layers with int8 parameters, as quantisation libraries write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 `[out, in]`, and a scale `[out, 1]`."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class Int8Weight(torch.Tensor):
    """A weight made of two tensors, which dequantises itself in every operator, as torchao's do."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Int8Weight:
        """It looks like the float tensor that it stands for."""
        made: Int8Weight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, strides=values.stride(), dtype=scale.dtype, device=values.device
        )
        return made

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values_int8 = values
        self.scale = scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values_int8", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], meta: None, size: Any, stride: Any) -> Int8Weight:
        return Int8Weight(inner["values_int8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            made = cls(func(args[0].values_int8), func(args[0].scale))
            return return_and_correct_aliasing(func, args, kwargs, made)
        args, kwargs = pytree.tree_map_only(cls, lambda t: t.values_int8 * t.scale, (args, kwargs))
        return func(*args, **kwargs)


class _Int8Product(torch.autograd.Function):
    """A product that dequantises within it, as bitsandbytes' do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, scale)
        return x @ (values * scale).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        values, scale = ctx.saved_tensors
        return gradients[0] @ (values * scale), None, None


class WithBuffers(nn.Module):
    """Weights in buffers, dequantised in the layer's Python, through an autograd function."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scale = quantised(linear.weight.detach())
        self.register_buffer("values_int8", values)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _Int8Product.apply(x, self.values_int8, self.scale)
        return y if self.bias is None else y + self.bias


class WithState(nn.Module):
    """Weights packed at the first call into an object that tracing cannot follow, as 4-bit layers hold theirs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.values_int8, self.scale = (part.numpy() for part in quantised(linear.weight.detach()))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.values_int8 * self.scale
        y = torch.from_numpy(x.detach().numpy() @ weight.T)
        return y if self.bias is None else y + self.bias


def with_tensor_subclass(linear: nn.Linear) -> nn.Module:
    """The same layer with a weight made of two tensors."""
    linear.weight = nn.Parameter(Int8Weight(*quantised(linear.weight.detach())), requires_grad=False)
    return linear


def quantise(model: nn.Module, layer: Callable[[nn.Linear], nn.Module], within: str) -> None:
    """Give every linear layer below a module with `within` in its path int8 parameters, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and within in path:
            model.set_submodule(path, layer(module).eval())
