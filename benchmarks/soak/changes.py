"""What can be done to a model that changes what its forward computes. Each change can be undone.

A change has values 0, 1, 2, ...; 0 is the state that the model was built in. Setting a value is idempotent, and setting
one again brings the very objects back that were there before: the state is the same one.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch.nn import functional as F

from benchmarks.soak import toy

Set = Callable[[Any, int], None]


@dataclass(frozen=True)
class Change:
    """One kind of change.

    Attributes:
        set: bring the denoiser of a pipeline into this value.
        values: how many there are.
        shared: it changes a class or a module, so every model of the process.
        around: it changes what runs around the forward, not the forward: streams go on.
    """

    set: Set
    values: int = 3
    shared: bool = False
    around: bool = False


def attribute(owner: Callable[[Any], Any], name: Any, *values: Any) -> Change:
    """An attribute or a key has one of these values."""

    def put(pipeline: Any, value: int) -> None:
        _put(owner(pipeline.transformer), name, values[value])

    return Change(put, len(values))


def _put(target: Any, name: Any, value: Any) -> None:
    if isinstance(target, (dict, list)):
        target[name] = value
    else:
        setattr(target, name, value)


def of_the_process(owner: Any, name: str, *others: Any) -> Change:
    """A name of a class or a module has its own value, or one of these."""
    values = (owner.__dict__[name], *others)
    return Change(lambda _, value: setattr(owner, name, values[value]), len(values), shared=True)


def objects(owner: Callable[[Any], Any], name: str, make: Callable[[Any, int], Any], values: int = 3) -> Change:
    """An attribute is replaced by other objects, made once per model and kept."""

    def put(pipeline: Any, value: int) -> None:
        target = owner(pipeline.transformer)
        own = target[name] if isinstance(target, dict) else getattr(target, name)
        kept = _kept(pipeline).setdefault((id(target), name), {0: own})
        if value not in kept:
            kept[value] = make(kept[0], value)
        _put(target, name, kept[value])

    return Change(put, values)


def own_forward(owner: Callable[[Any], Any]) -> Change:
    """An instance has a forward of its own."""

    def put(pipeline: Any, value: int) -> None:
        module = owner(pipeline.transformer)
        kept = _kept(pipeline).setdefault((id(module), "forward"), {})
        if value == 0:
            module.__dict__.pop("forward", None)
            return
        if value not in kept:
            kept[value] = types.MethodType(_of_its_class(type(module), FACTORS[value]), module)
        module.forward = kept[value]

    return Change(put)


def hook(owner: Callable[[Any], Any], *, before: bool = False, around: bool = False) -> Change:
    """A module has a forward hook, before it or after it."""

    def scale_input(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = next((name for name in ("hidden_states", "x") if name in kwargs), None)
        if name is not None:
            return args, {**kwargs, name: kwargs[name] * 0.9}
        return (args[0] * 0.9, *args[1:]), kwargs

    def scale_output(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        return _times(output, 0.8)

    def put(pipeline: Any, value: int) -> None:
        module = owner(pipeline.transformer)
        held = _kept(pipeline).setdefault((id(module), "hook", before), {})
        if value == 0 and "handle" in held:
            held.pop("handle").remove()
        elif value == 1 and "handle" not in held:
            held["handle"] = (
                module.register_forward_pre_hook(scale_input, with_kwargs=True)
                if before
                else module.register_forward_hook(scale_output)
            )

    return Change(put, 2, around=around)


FACTORS = (1.0, 0.7, 1.2)


def _of_its_class(cls: type[nn.Module], factor: float) -> Callable[..., Any]:
    """The forward that the class has when it is called, scaled."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _times(cls.forward(self, *args, **kwargs), factor)

    return forward


def scaled(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """A function with its result scaled; signature and name are kept."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _times(function(*args, **kwargs), factor)

    return call


def _times(output: Any, factor: float) -> Any:
    """Scale the first tensor of an output, whatever holds it."""
    if isinstance(output, torch.Tensor):
        return output * factor
    if isinstance(output, tuple):
        return (output[0] * factor, *output[1:])
    return type(output)(sample=output.sample * factor)


class Scaled:
    """An attention processor around another one."""

    def __init__(self, processor: Any, factor: float) -> None:
        self.processor, self.factor = processor, factor

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """The other one's result, scaled."""
        return _times(self.processor(attn, *args, **kwargs), self.factor)


def _kept(pipeline: Any) -> dict[Any, dict[Any, Any]]:
    """What changes keep of a pipeline, so that it goes when the pipeline does."""
    found: dict[Any, dict[Any, Any]] = pipeline.__dict__.setdefault("_soak_kept", {})
    return found


def other_weights(module: nn.Module, value: int) -> nn.Module:
    """A copy with other weights."""
    made = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(FACTORS[value])
    return made


def _set_default(_: Any, value: int) -> None:
    toy.soften.__defaults__ = ((0.9, 0.5, 1.1)[value],)


def _set_cell(pipeline: Any, value: int) -> None:
    pipeline.transformer.warp.__closure__[0].cell_contents[0] = (0.02, 0.3, -0.2)[value]


def _set_buffer(pipeline: Any, value: int) -> None:
    model = pipeline.transformer
    kept = _kept(pipeline).setdefault("table", {0: model.table})
    model.table = kept.setdefault(value, kept[0] * FACTORS[value])


def _tone(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * 0.8 + self.bias


OF_TOY: Mapping[str, Change] = {
    "attribute": attribute(lambda m: m, "gain", 1.0, 0.6, 1.3),
    "dict in a dict": attribute(lambda m: m.options["mix"], "alpha", 1.0, 0.7, 1.2),
    "list in a dict": attribute(lambda m: m.options["list"], 1, 1.0, 0.7, 1.2),
    "object in an object": attribute(lambda m: m.helper.inner, "bias", 0.1, 0.4, -0.3),
    "dict in a list in an object": attribute(lambda m: m.helper.inner.steps[0], "scale", 1.0, 0.6, 1.4),
    "function in a dict": attribute(lambda m: m.options, "activation", F.silu, F.gelu, F.tanh),
    "tensor in a dict": objects(lambda m: m.options, "offset", lambda own, value: own - 0.3 * value),
    "plain tensor": objects(lambda m: m, "offset", lambda own, value: own + 0.2 * value),
    "buffer": Change(_set_buffer),
    "processor": objects(lambda m: m.blocks[0].attn, "processor", lambda _, value: toy.Processor(FACTORS[value])),
    "state of a processor": attribute(lambda m: m.blocks[1].attn.processor, "scale", 1.0, 0.5, 1.5),
    "eps": attribute(lambda m: m.blocks[0].norm1, "eps", 1e-5, 0.1, 1.0),
    "closure": objects(lambda m: m, "shift", lambda _, value: toy.shifted([0.3 * value])),
    "closed-over value": Change(_set_cell),
    "site replaced": objects(lambda m: m.blocks[1], "mlp", other_weights),
    "module in a site replaced": objects(lambda m: m.blocks[1].attn, "out", other_weights),
    "forward of a site": own_forward(lambda m: m.blocks[0].mlp),
    "forward of the model": own_forward(lambda m: m),
    "hook": hook(lambda m: m.blocks[0].mlp),
    "hook in a site": hook(lambda m: m.blocks[1].mlp.first, before=True),
    "hook on the model": hook(lambda m: m, around=True),
    "hook before the model": hook(lambda m: m, before=True, around=True),
    "class attribute": of_the_process(toy.Toy, "damping", 0.2, 0.9),
    "forward of a site's class": of_the_process(toy.Mlp, "forward", *(scaled(toy.Mlp.forward, f) for f in FACTORS[1:])),
    "forward of the model's class": of_the_process(
        toy.Toy, "forward", *(scaled(toy.Toy.forward, f) for f in FACTORS[1:])
    ),
    "method of a class": of_the_process(toy.Inner, "tone", _tone),
    "global number": of_the_process(toy, "BRIGHTNESS", 0.8, 1.1),
    "global function": of_the_process(toy, "blend", lambda x, y: x - y),
    "function of a function": of_the_process(toy, "soften", lambda x, by=0.4: x * by),
    "default of a function": Change(_set_default, shared=True),
}


def _attention(model: Any) -> Any:
    block = model.transformer_blocks[0]
    return block.attn if hasattr(block, "attn") else block.attn1


def _norm(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, nn.LayerNorm))


def _set_lora(pipeline: Any, value: int) -> None:
    name, weight = (("a", 1.0), ("a", 0.3), ("b", 1.0))[value]
    pipeline.transformer.set_adapters([name], [weight])


OF_DIFFUSERS: Mapping[str, Change] = {
    "eps": objects(_norm, "eps", lambda own, value: 0.3 * value),
    "processor": objects(_attention, "processor", lambda own, value: Scaled(own, FACTORS[value])),
    "site replaced": objects(lambda m: m.transformer_blocks[1], "ff", other_weights),
    "forward of a site": own_forward(lambda m: m.transformer_blocks[0].ff),
    "forward of the model": own_forward(lambda m: m),
    "hook": hook(lambda m: m.transformer_blocks[0].ff),
    "hook in a site": hook(lambda m: m.transformer_blocks[0].ff.net[2], before=True),
    "hook on the model": hook(lambda m: m, around=True),
    "forward of a site's class": of_the_process(
        FeedForward, "forward", *(scaled(FeedForward.forward, factor) for factor in FACTORS[1:])
    ),
    "forward of a class in a site": of_the_process(
        nn.Linear, "forward", *(scaled(nn.Linear.forward, factor) for factor in (0.97, 1.02))
    ),
    "global function": of_the_process(F, "scaled_dot_product_attention", scaled(F.scaled_dot_product_attention, 0.8)),
}
LORA: Mapping[str, Change] = {"adapters": Change(_set_lora)}
IP_ADAPTER: Mapping[str, Change] = {
    "image scale": Change(lambda pipeline, value: pipeline.set_ip_adapter_scale((1.0, 0.0, 2.0)[value]))
}


def of_the_class(cls: type[nn.Module]) -> Mapping[str, Change]:
    """The change that puts another forward into the class of a denoiser."""
    factors = FACTORS[1:]
    return {"forward of the model's class": of_the_process(cls, "forward", *(scaled(cls.forward, f) for f in factors))}
