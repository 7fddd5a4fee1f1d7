"""All changes that the soak makes to a model. Each alters what the forward computes, and can be undone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch.nn import functional as F

from benchmarks.soak import toy
from benchmarks.soak.change import (
    FACTORS,
    Change,
    Scaled,
    attribute,
    hook,
    kept_objects,
    objects,
    of_the_process,
    other_parameters,
    own_forward,
    scaled,
)


def _set_default(_: Any, value: int) -> None:
    toy.soften.__defaults__ = ((0.9, 0.5, 1.1)[value],)


def _set_cell(pipeline: Any, value: int) -> None:
    pipeline.transformer.warp.__closure__[0].cell_contents[0] = (0.02, 0.3, -0.2)[value]


def _set_buffer(pipeline: Any, value: int) -> None:
    model = pipeline.transformer
    kept = kept_objects(pipeline).setdefault("table", {0: model.table})
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
    "site replaced": objects(lambda m: m.blocks[1], "mlp", other_parameters),
    "module in a site replaced": objects(lambda m: m.blocks[1].attn, "out", other_parameters),
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
    "site replaced": objects(lambda m: m.transformer_blocks[1], "ff", other_parameters),
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
    """The change that replaces the forward of a denoiser's class."""
    factors = FACTORS[1:]
    return {"forward of the model's class": of_the_process(cls, "forward", *(scaled(cls.forward, f) for f in factors))}
