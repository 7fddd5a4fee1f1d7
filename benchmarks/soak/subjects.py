"""Pipelines to soak: each is built anew from a seed, and called for a run that is described as data.

The one that is written here is fast and reads every kind of state; the others are tiny pipelines of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import torch
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig

from benchmarks.soak import changes, toy
from benchmarks.soak.changes import Change
from tests.tiny import families, randomised

_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SAMPLERS: Mapping[str, Callable[[], Any]] = {
    "DDIM": functools.partial(d.DDIMScheduler, **_BETAS),
    "Euler": functools.partial(d.EulerDiscreteScheduler, **_BETAS),
    "Euler ancestral": functools.partial(d.EulerAncestralDiscreteScheduler, **_BETAS),
    "DPM++": functools.partial(d.DPMSolverMultistepScheduler, **_BETAS),
    "UniPC": functools.partial(d.UniPCMultistepScheduler, **_BETAS),
    "Heun": functools.partial(d.HeunDiscreteScheduler, **_BETAS),
    "KDPM2": functools.partial(d.KDPM2DiscreteScheduler, **_BETAS),
    "KDPM2 ancestral": functools.partial(d.KDPM2AncestralDiscreteScheduler, **_BETAS),
    "PNDM": functools.partial(d.PNDMScheduler, skip_prk_steps=True, **_BETAS),
    "flow": d.FlowMatchEulerDiscreteScheduler,
    "flow Heun": d.FlowMatchHeunDiscreteScheduler,
    "flow, shifted": functools.partial(d.FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
}
_OF_NOISE = tuple(name for name in SAMPLERS if not name.startswith("flow"))
_LATE = ("Euler", "Euler ancestral", "DPM++", "UniPC", "flow")  # one evaluation per step, and they have set_begin_index


@functools.cache
def evaluations(sampler: str, asked: int) -> int:
    """How many steps a run has, as the sampler counts them."""
    scheduler = SAMPLERS[sampler]()
    scheduler.set_timesteps(asked, **({"mu": 1.0} if sampler == "flow, shifted" else {}))
    return len(scheduler.timesteps)


class Controls:
    """What a callback may do to the run that is under way. Each subject offers some of it, and asks for no other."""

    def prompt(self, value: int, *, in_place: bool) -> None:
        """Go on with this prompt, in the memory of the one before or in its own."""
        raise NotImplementedError

    def guidance_off(self) -> None:
        """Go on without guidance."""
        raise NotImplementedError

    def stop(self) -> None:
        """Let this step be the last one."""
        raise NotImplementedError


OnStepEnd = Callable[[int, torch.Tensor, Controls], None]


@dataclass(frozen=True)
class Subject:
    """A kind of pipeline.

    Attributes:
        build: make one from the world's seed, variant and sampler.
        sample: run it; returns the last latents or the images.
        arguments: those of one call of its denoiser, made from a seed.
        changes: what can be done to it.
        samplers: the schedulers that fit it.
        guidance: whether it has any.
        events: kinds of events that it can have besides changes.
        before: what may happen right before a run, and how often.
    """

    build: Callable[[int, int, str], Any]
    sample: Callable[[Any, Any, int, OnStepEnd], torch.Tensor]
    arguments: Callable[[Any, int], dict[str, Any]]
    changes: Mapping[str, Change]
    samplers: tuple[str, ...]
    guidance: bool = True
    events: tuple[str, ...] = ("raise", "outside", "gradient", "collect")
    late: tuple[str, ...] = ()
    before: Mapping[str, float] = field(
        default_factory=lambda: {
            "save and load": 0.03,
            "compile again": 0.03,
            "another scheduler": 0.05,
            "collect": 0.02,
            "outside": 0.05,
            "gradient": 0.08,
        }
    )

    def starts_late(self, sampler: str) -> bool:
        """Whether a run may begin at a later step."""
        return sampler in self.late


# ---- a pipeline of one's own


class _LoopControls(Controls):
    def __init__(self, loop: toy.Loop) -> None:
        self._loop = loop
        self._base = loop.request.prompt.clone()

    def prompt(self, value: int, *, in_place: bool) -> None:
        request = self._loop.request
        if in_place:
            request.prompt.copy_(self._base * PROMPT_FACTORS[value])
        else:
            request.prompt = self._base * PROMPT_FACTORS[value]

    def guidance_off(self) -> None:
        self._loop.request.guidance = 1.0

    def stop(self) -> None:
        self._loop._interrupt = True


PROMPT_FACTORS = (1.0, -0.7, 0.4)


def _build_loop(seed: int, variant: int, sampler: str) -> toy.Loop:
    return toy.Loop(
        toy.toy(seed),
        SAMPLERS[sampler](),
        prompt_name=toy.PROMPT_NAMES[variant % 3],
        two_calls=variant // 3 % 2 == 1,
        joined_once=variant // 6 % 2 == 1,
    )


def loop_request(run: Any, asked: int) -> toy.Request:
    """What a `Loop` is asked for in a run."""
    generator = torch.Generator().manual_seed(run.seed)
    tokens = (4, 6)[run.size]
    latents = torch.randn(run.batch, tokens, toy.WIDTH, generator=generator)
    prompt, negative = (torch.randn(run.batch, 3, toy.WIDTH, generator=generator) for _ in range(2))
    return toy.Request(
        latents=latents,
        prompt=prompt * PROMPT_FACTORS[run.prompt],
        negative=negative,
        guidance=2.5 if run.guided else 1.0,
        asked=asked,
        first=run.first,
        generator=generator,
    )


def _sample_loop(loop: toy.Loop, run: Any, asked: int, on_step_end: OnStepEnd) -> torch.Tensor:
    request = loop_request(run, asked)
    loop.request = request
    controls = _LoopControls(loop)
    return loop(request, lambda index, latents: on_step_end(index, latents, controls))


def _loop_arguments(loop: toy.Loop, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    latents, prompt = (torch.randn(1, count, toy.WIDTH, generator=generator) for count in (4, 3))
    return loop.arguments(latents, torch.tensor(100 + seed % 800), prompt)


# ---- pipelines of diffusers


class _CallbackControls(Controls):
    """The controls of a pipeline with `callback_on_step_end`, which returns `changed`."""

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


def _call_of(name: str, run: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call, in tensors of their own."""
    family = families()[name]
    call = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in (family.guided if run.guided else family.unguided).items()
    }
    for key, value in call.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            call[key] = value * (0.5 if key.startswith("negative") else PROMPT_FACTORS[run.prompt])
    if "height" in call:
        call["height"] = (8, 16)[run.size]
    if "class_labels" in call:
        call["class_labels"] = [run.prompt, 5, 7][: run.batch]
    elif "pooled_prompt_embeds" in call:  # SD3 and Flux repeat no embeddings that they are given
        embeddings = {key: value for key, value in call.items() if "prompt_embeds" in key}
        call.update({key: value.repeat_interleave(run.batch, dim=0) for key, value in embeddings.items()})
    else:
        call["num_images_per_prompt"] = run.batch
    return call


def _sample_with_callback(
    name: str,
    inputs: tuple[str, ...],
    extra: Callable[[Any, int], dict[str, Any]],
    pipeline: Any,
    run: Any,
    asked: int,
    on_step_end: OnStepEnd,
) -> torch.Tensor:
    controls = _CallbackControls(pipeline)

    def callback(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        controls.tensors, controls.changed = tensors, {}
        on_step_end(index, tensors["latents"], controls)
        return controls.changed

    return _images(
        pipeline,
        run,
        num_inference_steps=asked,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", *inputs],
        **{**_call_of(name, run), **extra(run, asked)},
    )


def _sample_pixart(pipeline: Any, run: Any, asked: int, on_step_end: OnStepEnd) -> torch.Tensor:
    """Its callback comes after every step, also of two evaluations, and takes no part in the run."""
    controls = Controls()
    call = _call_of("pixart-alpha", run)
    return _images(
        pipeline,
        run,
        num_inference_steps=asked,
        callback=lambda index, _, latents: on_step_end(index, latents, controls),
        callback_steps=1,
        **call,
    )


def _sample_dit(pipeline: Any, run: Any, asked: int, on_step_end: OnStepEnd) -> torch.Tensor:
    """It has no callback; a hook of the denoiser itself comes after the call of each step."""
    calls = 0
    controls = Controls()

    def after(_: Any, __: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        on_step_end(calls - 1, output.sample, controls)

    handle = pipeline.transformer.register_forward_hook(after)
    try:
        return _images(pipeline, run, num_inference_steps=asked, **_call_of("dit", run))
    finally:
        handle.remove()


def _images(pipeline: Any, run: Any, **call: Any) -> torch.Tensor:
    torch.manual_seed(run.seed)  # some pipelines encode images with torch's own generator
    generator = torch.Generator().manual_seed(run.seed)
    images = pipeline(generator=generator, output_type="np", **call).images
    return torch.from_numpy(images)


def _nothing(run: Any, asked: int) -> dict[str, Any]:
    return {}


def _built(build: Callable[[], Any], seed: int, sampler: str) -> Any:
    torch.manual_seed(seed)
    pipeline = build()
    pipeline.scheduler = SAMPLERS[sampler]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _build_family(name: str, seed: int, variant: int, sampler: str) -> Any:
    return _built(families()[name].build, seed, sampler)


def _build_lora(name: str, seed: int, variant: int, sampler: str) -> Any:
    pipeline = _build_family(name, seed, variant, sampler)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"])
    for adapter in ("a", "b"):
        pipeline.transformer.add_adapter(config, adapter_name=adapter)
    for key, parameter in pipeline.transformer.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    changes.LORA["adapters"].set(pipeline, 0)
    pipeline.transformer.eval()
    return pipeline


def _build_image_prompts(seed: int, variant: int, sampler: str) -> Any:
    pipeline = _build_family("flux", seed, variant, sampler)
    model = pipeline.transformer
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=12, num_image_text_embeds=4)
    processors = [FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=12) for _ in model.transformer_blocks]
    weights = {
        f"{index}.{name.replace('ip.0.', 'ip.')}": value
        for index, processor in enumerate(processors)
        for name, value in randomised(processor).state_dict().items()
    }
    projected = {
        name.replace("image_embeds", "proj"): value for name, value in randomised(projection).state_dict().items()
    }
    model._load_ip_adapter_weights([{"image_proj": projected, "ip_adapter": weights}])
    return pipeline


def _image_prompt(run: Any, asked: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(run.seed)
    given = {
        name: [torch.randn(1, 1, 6, generator=generator)]
        for name in ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
    }
    return {**given, "guidance_scale": 3.5}


def _build_late(seed: int, variant: int, sampler: str) -> Any:
    return _built(lambda: d.StableDiffusion3Img2ImgPipeline(**families()["sd3"].build().components), seed, sampler)


def _from_image(run: Any, asked: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(run.seed + 1)
    image = torch.rand(1, 3, (8, 16)[run.size], 8, generator=generator)
    return {"image": image, "strength": (asked - run.first) / asked - 1e-3}  # rounds up to the steps left


def _arguments_of(name: str, pipeline: Any, seed: int) -> dict[str, Any]:
    """Those of one call, as the pipeline makes them."""
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


def _of_diffusers(
    name: str,
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
        build=build or functools.partial(_build_family, name),
        sample=sample,
        arguments=functools.partial(_arguments_of, name),
        changes={name: change for name, change in found.items() if name not in without},
        samplers=samplers,
        **options,
    )


def _with_callback(name: str, *inputs: str, extra: Callable[[Any, int], dict[str, Any]] = _nothing) -> Any:
    return functools.partial(_sample_with_callback, name, inputs, extra)


_EVENTS = ("raise", "outside", "gradient", "collect", "stop")
_PROMPTS = ("prompt", "prompt in place")
_SD3 = _with_callback("sd3", "prompt_embeds", "pooled_prompt_embeds")
_FLUX = _with_callback("flux", "prompt_embeds")

SUBJECTS: Mapping[str, Subject] = {
    "loop": Subject(
        _build_loop,
        _sample_loop,
        _loop_arguments,
        changes.OF_TOY,
        (*_OF_NOISE, "flow"),
        events=(*_EVENTS, *_PROMPTS, "guidance"),
        late=_LATE,
    ),
    "dit": _of_diffusers("dit", _sample_dit, ("DDIM", "DPM++", "Euler"), cls=d.DiTTransformer2DModel),
    "pixart": _of_diffusers("pixart-alpha", _sample_pixart, _OF_NOISE, cls=d.PixArtTransformer2DModel),
    "sd3": _of_diffusers("sd3", _SD3, ("flow",), cls=d.SD3Transformer2DModel, events=(*_EVENTS, *_PROMPTS, "guidance")),
    "sd3, from an image": _of_diffusers(
        "sd3",
        _with_callback("sd3", "prompt_embeds", extra=_from_image),
        ("flow",),
        cls=d.SD3Transformer2DModel,
        build=_build_late,
        events=(*_EVENTS, *_PROMPTS),
        late=("flow",),
    ),
    "sd3, LoRA": _of_diffusers(
        "sd3",
        _SD3,
        ("flow",),
        cls=d.SD3Transformer2DModel,
        build=functools.partial(_build_lora, "sd3"),
        more=changes.LORA,
        events=(*_EVENTS, *_PROMPTS),
    ),
    "flux": _of_diffusers(
        "flux", _FLUX, ("flow, shifted",), cls=d.FluxTransformer2DModel, events=(*_EVENTS, *_PROMPTS)
    ),
    "flux, image prompt": _of_diffusers(
        "flux",
        _with_callback("flux", "prompt_embeds", extra=_image_prompt),
        ("flow, shifted",),
        cls=d.FluxTransformer2DModel,
        build=_build_image_prompts,
        more=changes.IP_ADAPTER,
        without=("processor",),  # here it is a module, and the layer inspects the signature of its forward
        events=(*_EVENTS, *_PROMPTS),
    ),
}
