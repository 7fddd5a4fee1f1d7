"""All subjects by name: the toy loop, and tiny pipelines of diffusers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers as d
import torch

from benchmarks.soak import changes
from benchmarks.soak.change import Change
from benchmarks.soak.diffusers_builds import build_family, build_image_prompt, build_image_to_image, build_with_loras
from benchmarks.soak.diffusers_calls import (
    denoiser_arguments,
    from_image,
    image_prompt,
    nothing,
    sample_dit,
    sample_pixart,
    sample_with_callback,
)
from benchmarks.soak.loop_subject import LOOP
from benchmarks.soak.samplers import NOISE_SAMPLERS
from benchmarks.soak.subject import Subject
from benchmarks.soak.world import Request


def _subject(
    family: str,
    sample: Callable[..., torch.Tensor],
    samplers: tuple[str, ...],
    *,
    cls: Any,
    build: Callable[..., Any] | None = None,
    more: Mapping[str, Change] | None = None,
    without: Sequence[str] = (),
    **options: Any,
) -> Subject:
    found = {**changes.OF_DIFFUSERS, **changes.of_the_class(cls), **(more or {})}
    return Subject(
        build=build or functools.partial(build_family, family),
        sample=sample,
        arguments=functools.partial(denoiser_arguments, family),
        changes={name: change for name, change in found.items() if name not in without},
        samplers=samplers,
        **options,
    )


def _with_callback(family: str, *inputs: str, extra: Callable[[Request, int], dict[str, Any]] = nothing) -> Any:
    return functools.partial(sample_with_callback, family, inputs, extra)


_STOPPABLE = ("raise", "outside", "gradient", "collect", "stop")
_PROMPTED = (*_STOPPABLE, "prompt", "prompt in place")
_sd3 = functools.partial(_subject, "sd3", samplers=("flow",), cls=d.SD3Transformer2DModel)
_flux = functools.partial(_subject, "flux", samplers=("flow, shifted",), cls=d.FluxTransformer2DModel, events=_PROMPTED)
_sample_sd3 = _with_callback("sd3", "prompt_embeds", "pooled_prompt_embeds")

SUBJECTS: Mapping[str, Subject] = {
    "loop": LOOP,
    "dit": _subject("dit", sample_dit, ("DDIM", "DPM++", "Euler"), cls=d.DiTTransformer2DModel),
    "pixart": _subject("pixart-alpha", sample_pixart, NOISE_SAMPLERS, cls=d.PixArtTransformer2DModel),
    "sd3": _sd3(_sample_sd3, events=(*_PROMPTED, "guidance")),
    "sd3, from an image": _sd3(
        _with_callback("sd3", "prompt_embeds", extra=from_image),
        build=build_image_to_image,
        events=_PROMPTED,
        late=("flow",),
    ),
    "sd3, LoRA": _sd3(
        _sample_sd3, build=functools.partial(build_with_loras, "sd3"), more=changes.LORA, events=_PROMPTED
    ),
    "flux": _flux(_with_callback("flux", "prompt_embeds")),
    "flux, image prompt": _flux(
        _with_callback("flux", "prompt_embeds", extra=image_prompt),
        build=build_image_prompt,
        more=changes.IP_ADAPTER,
        without=("processor",),  # here it is a module, and the layer inspects the signature of its forward
    ),
}
