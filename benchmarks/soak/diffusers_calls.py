"""Runs tiny pipelines of diffusers for a request, and gives arguments to call their denoisers outside a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.soak.subject import PROMPT_FACTORS, Controls, OnStepEnd
from benchmarks.soak.world import Request
from tests.tiny import families


class _CallbackControls(Controls):
    """The controls of a pipeline whose `callback_on_step_end` returns `changed`."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.tensors: dict[str, torch.Tensor] = {}
        self.changed: dict[str, torch.Tensor] = {}
        self._base: torch.Tensor | None = None

    def prompt(self, value: int, *, in_place: bool) -> None:
        now = self.changed.get("prompt_embeds", self.tensors["prompt_embeds"])  # guidance may have ended in this step
        if self._base is None or self._base.shape != now.shape:
            self._base = now.clone()
        wanted = self._base * PROMPT_FACTORS[value]
        self.changed["prompt_embeds"] = now.copy_(wanted) if in_place else wanted

    def guidance_off(self) -> None:
        self._pipeline._guidance_scale = 0.0
        self.changed.update({name: value.chunk(2)[1] for name, value in self.tensors.items() if "prompt" in name})

    def stop(self) -> None:
        self._pipeline._interrupt = True


def _call_of(name: str, request: Request) -> dict[str, Any]:
    """Arguments of a pipeline's call for a request; tensors are copied."""
    family = families()[name]
    call = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in (family.guided if request.guided else family.unguided).items()
    }
    for key, value in call.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            call[key] = value * (0.5 if key.startswith("negative") else PROMPT_FACTORS[request.prompt])
    if "height" in call:
        call["height"] = (8, 16)[request.size]
    if "class_labels" in call:
        call["class_labels"] = [request.prompt, 5, 7][: request.batch]
    elif "pooled_prompt_embeds" in call:  # SD3 and Flux do not repeat the embeddings passed to them
        embeddings = {key: value for key, value in call.items() if "prompt_embeds" in key}
        call.update({key: value.repeat_interleave(request.batch, dim=0) for key, value in embeddings.items()})
    else:
        call["num_images_per_prompt"] = request.batch
    return call


def sample_with_callback(
    name: str,
    inputs: tuple[str, ...],
    extra: Callable[[Request, int], dict[str, Any]],
    pipeline: Any,
    request: Request,
    inference_steps: int,
    on_step_end: OnStepEnd,
) -> torch.Tensor:
    """Sample with `callback_on_step_end`.

    Args:
        name: family in `tests.tiny.families`.
        inputs: tensors that the callback receives besides the latents.
        extra: further arguments of the pipeline's call, from request and number of inference steps.
        pipeline: the pipeline.
        request: what it is asked for.
        inference_steps: number of inference steps.
        on_step_end: called after each step.
    """
    controls = _CallbackControls(pipeline)

    def callback(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        controls.tensors, controls.changed = tensors, {}
        on_step_end(index, tensors["latents"], controls)
        return controls.changed

    return _images(
        pipeline,
        request,
        num_inference_steps=inference_steps,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", *inputs],
        **{**_call_of(name, request), **extra(request, inference_steps)},
    )


def sample_pixart(pipeline: Any, request: Request, inference_steps: int, on_step_end: OnStepEnd) -> torch.Tensor:
    """Sample with the older `callback`, which is called after every evaluation and cannot change the run."""
    controls = Controls()
    call = _call_of("pixart-alpha", request)
    return _images(
        pipeline,
        request,
        num_inference_steps=inference_steps,
        callback=lambda index, _, latents: on_step_end(index, latents, controls),
        callback_steps=1,
        **call,
    )


def sample_dit(pipeline: Any, request: Request, inference_steps: int, on_step_end: OnStepEnd) -> torch.Tensor:
    """Sample with a forward hook of the denoiser in place of a callback, which this pipeline lacks."""
    calls = 0
    controls = Controls()

    def after(_: Any, __: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        on_step_end(calls - 1, output.sample, controls)

    handle = pipeline.transformer.register_forward_hook(after)
    try:
        return _images(pipeline, request, num_inference_steps=inference_steps, **_call_of("dit", request))
    finally:
        handle.remove()


def _images(pipeline: Any, request: Request, **call: Any) -> torch.Tensor:
    torch.manual_seed(request.seed)  # some pipelines encode images with torch's global generator
    generator = torch.Generator().manual_seed(request.seed)
    images = pipeline(generator=generator, output_type="np", **call).images
    return torch.from_numpy(images)


def nothing(request: Request, inference_steps: int) -> dict[str, Any]:
    """No further arguments."""
    return {}


def image_prompt(request: Request, inference_steps: int) -> dict[str, Any]:
    """Arguments for an IP adapter: image embeddings drawn from the request's seed."""
    generator = torch.Generator().manual_seed(request.seed)
    given = {
        name: [torch.randn(1, 1, 6, generator=generator)]
        for name in ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
    }
    return {**given, "guidance_scale": 3.5}


def from_image(request: Request, inference_steps: int) -> dict[str, Any]:
    """Arguments for an image-to-image pipeline: a random image, and the strength that leaves the request's steps."""
    generator = torch.Generator().manual_seed(request.seed + 1)
    image = torch.rand(1, 3, (8, 16)[request.size], 8, generator=generator)
    # slightly less than the share, because the number of skipped steps is rounded down
    return {"image": image, "strength": (inference_steps - request.first) / inference_steps - 1e-3}


def denoiser_arguments(name: str, pipeline: Any, seed: int) -> dict[str, Any]:
    """Keyword arguments of one call of the denoiser, in the form in which the family's pipeline passes them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    t = torch.tensor([100.0 + seed % 800])
    if name == "dit":
        return {"hidden_states": normal(1, 4, 4, 4), "timestep": t.long(), "class_labels": torch.tensor([3])}
    if name == "pixart-alpha":
        prompt = {"encoder_hidden_states": normal(1, 7, 12), "encoder_attention_mask": torch.ones(1, 7)}
        return {
            "hidden_states": normal(1, 4, 8, 8),
            "timestep": t.long(),
            **prompt,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    prompt = {"encoder_hidden_states": normal(1, 5, 12), "pooled_projections": normal(1, 10)}
    if name == "sd3":
        return {"hidden_states": normal(1, 16, 8, 8), "timestep": t, **prompt}
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3), "guidance": torch.tensor([3.5])}
    projection = getattr(pipeline.transformer, "encoder_hid_proj", None)
    image = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [normal(1, 1, 6)]}} if projection is not None else {}
    return {"hidden_states": normal(1, 16, 4), "timestep": t / 1000, **prompt, **ids, **image}
