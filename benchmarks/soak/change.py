"""Defines what a change of a model is, and the ways to make one. Each change can be undone.

A change has values 0, 1, 2, ...; 0 is the state that the model was built in. Setting a value is idempotent. Setting an
earlier value again brings back the same objects as before, so that the model is in the same state again.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Set = Callable[[Any, int], None]
"""(pipeline, value) -> None."""
FACTORS = (1.0, 0.7, 1.2)  # by value


@dataclass(frozen=True)
class Change:
    """One kind of change.

    Attributes:
        set: gives the denoiser of a pipeline this value of the change.
        values: number of values.
        shared: True if it changes a class or a module, and so every model in the process.
        around: True if it changes what runs around the forward, not the forward itself; streams continue.
    """

    set: Set
    values: int = 3
    shared: bool = False
    around: bool = False


def attribute(owner: Callable[[Any], Any], name: Any, *values: Any) -> Change:
    """Set an attribute or a key to one of these values."""

    def put(pipeline: Any, value: int) -> None:
        _put(owner(pipeline.transformer), name, values[value])

    return Change(put, len(values))


def _put(target: Any, name: Any, value: Any) -> None:
    if isinstance(target, (dict, list)):
        target[name] = value
    else:
        setattr(target, name, value)


def of_the_process(owner: Any, name: str, *others: Any) -> Change:
    """Set a name in a class or a module to its original value or to one of `others`."""
    values = (owner.__dict__[name], *others)
    return Change(lambda _, value: setattr(owner, name, values[value]), len(values), shared=True)


def objects(owner: Callable[[Any], Any], name: str, make: Callable[[Any, int], Any], values: int = 3) -> Change:
    """Replace an attribute or a key by other objects, which are made once per model and kept."""

    def put(pipeline: Any, value: int) -> None:
        target = owner(pipeline.transformer)
        own = target[name] if isinstance(target, dict) else getattr(target, name)
        kept = kept_objects(pipeline).setdefault((id(target), name), {0: own})
        if value not in kept:
            kept[value] = make(kept[0], value)
        _put(target, name, kept[value])

    return Change(put, values)


def own_forward(owner: Callable[[Any], Any]) -> Change:
    """Give one module its own forward, scaled by `FACTORS`."""

    def put(pipeline: Any, value: int) -> None:
        module = owner(pipeline.transformer)
        kept = kept_objects(pipeline).setdefault((id(module), "forward"), {})
        if value == 0:
            module.__dict__.pop("forward", None)
            return
        if value not in kept:
            kept[value] = types.MethodType(_of_its_class(type(module), FACTORS[value]), module)
        module.forward = kept[value]

    return Change(put)


def hook(owner: Callable[[Any], Any], *, before: bool = False, around: bool = False) -> Change:
    """Give one module a forward hook, before or after its forward."""

    def scale_input(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = next((name for name in ("hidden_states", "x") if name in kwargs), None)
        if name is not None:
            return args, {**kwargs, name: kwargs[name] * 0.9}
        return (args[0] * 0.9, *args[1:]), kwargs

    def scale_output(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        return _times(output, 0.8)

    def put(pipeline: Any, value: int) -> None:
        module = owner(pipeline.transformer)
        held = kept_objects(pipeline).setdefault((id(module), "hook", before), {})
        if value == 0 and "handle" in held:
            held.pop("handle").remove()
        elif value == 1 and "handle" not in held:
            held["handle"] = (
                module.register_forward_pre_hook(scale_input, with_kwargs=True)
                if before
                else module.register_forward_hook(scale_output)
            )

    return Change(put, 2, around=around)


def _of_its_class(cls: type[nn.Module], factor: float) -> Callable[..., Any]:
    """A forward that scales the result of the class's current one."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _times(cls.forward(self, *args, **kwargs), factor)

    return forward


def scaled(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """The function with its result scaled; name and signature are kept."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _times(function(*args, **kwargs), factor)

    return call


def _times(output: Any, factor: float) -> Any:
    """Scale the first tensor of an output: a tensor, a tuple or an output record of diffusers."""
    if isinstance(output, torch.Tensor):
        return output * factor
    if isinstance(output, tuple):
        return (output[0] * factor, *output[1:])
    return type(output)(sample=output.sample * factor)


class Scaled:
    """An attention processor that scales the result of another one."""

    def __init__(self, processor: Any, factor: float) -> None:
        self.processor, self.factor = processor, factor

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """The other processor's result, scaled."""
        return _times(self.processor(attn, *args, **kwargs), self.factor)


def kept_objects(pipeline: Any) -> dict[Any, dict[Any, Any]]:
    """The objects that changes keep for a pipeline; they are freed with it."""
    found: dict[Any, dict[Any, Any]] = pipeline.__dict__.setdefault("_soak_kept", {})
    return found


def other_parameters(module: nn.Module, value: int) -> nn.Module:
    """A copy of the module with its parameters scaled."""
    made = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(FACTORS[value])
    return made
