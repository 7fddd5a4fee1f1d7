"""A small transformer whose forward reads every kind of Python state, and a sampling loop as people write them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 8
BRIGHTNESS = 1.0  # a number that the forward reads by name


def soften(x: torch.Tensor, by: float = 0.9) -> torch.Tensor:
    """A function that another function calls by name, with a default."""
    return x * by


def blend(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A function that the forward calls by name."""
    return x + soften(y)


def shifted(amount: list[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A closure over a list, whose contents may change."""
    return lambda x: x + amount[0]


class Inner:
    """An object within an object."""

    def __init__(self) -> None:
        self.bias = 0.1
        self.steps = [{"scale": 1.0}]

    def tone(self, x: torch.Tensor) -> torch.Tensor:
        """A method of a class that is no module."""
        return x * self.steps[0]["scale"] + self.bias


class Helper:
    """An object that hangs on the model."""

    def __init__(self) -> None:
        self.inner = Inner()


class Processor:
    """Attention as an object, which may be replaced."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, attn: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D], `context` [B, L, D]; returns [B, N, D]."""
        query, (key, value) = attn.query(x), attn.pair(context).chunk(2, dim=-1)
        return attn.out(F.scaled_dot_product_attention(query, key, value) * self.scale)


class Attention(nn.Module):
    """Attention over the tokens and the prompt; a site."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.pair, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.processor: Any = Processor()

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """See `Processor`."""
        result: torch.Tensor = self.processor(self, x, context)
        return result


class Mlp(nn.Module):
    """A feed-forward; a site."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D]."""
        result: torch.Tensor = self.second(F.gelu(self.first(x)))
        return result


class Block(nn.Module):
    """Attention and feed-forward, each with a residual that is scaled by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x: torch.Tensor, prompt: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D], `prompt` [B, L, D], `scale` [B, 1, D]."""
        x = x + scale * self.attn(self.norm1(x), torch.cat([x, prompt], dim=1))
        return x + scale * self.mlp(self.norm2(x))


class Toy(nn.Module):
    """A denoiser. The prompt has one of several names, of which some say that they are conditioning."""

    damping = 0.5  # of the class

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.gain = 1.0
        self.options: dict[str, Any] = {"mix": {"alpha": 1.0}, "list": [0.5, 1.0], "activation": F.silu}
        self.options["offset"] = torch.linspace(-0.1, 0.1, WIDTH)
        self.helper = Helper()
        self.shift, self.warp = shifted([0.05]), shifted([0.02])
        self.offset = torch.linspace(0.0, 0.2, WIDTH)
        self.register_buffer("table", torch.linspace(0.9, 1.1, WIDTH))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        cap_feats: torch.Tensor | None = None,
        extras: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`hidden_states` [B, N, D], `timestep` [B], the prompt [B, L, D]; returns [B, N, D]."""
        given = (encoder_hidden_states, cap_feats, extras["tokens"] if extras is not None else None)
        prompt = next(one for one in given if one is not None)
        angle = timestep.to(hidden_states.dtype)[:, None] * 0.01
        scale = self.options["activation"](self.embed(torch.cat([angle.sin(), angle.cos()], dim=1)))[:, None]
        x = hidden_states * self.gain * self.options["mix"]["alpha"] + self.offset + self.options["offset"]
        x = self.helper.inner.tone(x) * self.table
        for block in self.blocks:
            x = block(x, prompt, scale)
        x = blend(x * self.options["list"][1], hidden_states * type(self).damping)
        return self.warp(self.shift(x)) * BRIGHTNESS


PROMPT_NAMES = ("encoder_hidden_states", "cap_feats", "extras")


def toy(seed: int) -> Toy:
    """In eval mode, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    model = Toy().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


@dataclass
class Request:
    """One run of a `Loop`. `prompt` and `negative` [B, L, D] and `guidance` may be changed while it runs."""

    latents: torch.Tensor
    prompt: torch.Tensor
    negative: torch.Tensor
    guidance: float  # 1 for none
    asked: int
    first: int
    generator: torch.Generator


class Loop:
    """A pipeline of one's own: guidance in one call or in two, timesteps as the scheduler has them or scaled.

    Args:
        denoiser: what is called, in the place of `transformer`, for a model that is compiled by itself.
    """

    def __init__(
        self, transformer: Toy, scheduler: Any, *, prompt_name: str, two_calls: bool, joined_once: bool
    ) -> None:
        self.transformer = transformer
        self.scheduler = scheduler
        self.denoiser: Any = None
        self.request: Request
        self._interrupt = False
        self._prompt_name, self._two_calls, self._joined_once = prompt_name, two_calls, joined_once

    def __call__(self, request: Request, on_step_end: Callable[[int, torch.Tensor], None]) -> torch.Tensor:
        """The last latents [B, N, D]."""
        for index, latents in self.steps(request):
            on_step_end(index, latents)
            if self._interrupt:
                break
        return latents

    def steps(self, request: Request) -> Iterator[tuple[int, torch.Tensor]]:
        """Each step's number and latents; a run that can be halted between steps."""
        self.request, self._interrupt = request, False
        if self.denoiser is not None:
            self.denoiser.reset()
        self.scheduler.set_timesteps(request.asked)
        if request.first:
            self.scheduler.set_begin_index(request.first)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": request.generator} if takes_generator else {}
        x = request.latents * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        for index, t in enumerate(self.scheduler.timesteps[request.first :]):
            with torch.no_grad():
                scale = getattr(self.scheduler, "scale_model_input", lambda latents, _: latents)
                noise = self._guided(scale(x, t), t)
                x = self.scheduler.step(noise, t, x, **extra, return_dict=False)[0]
            yield index, x

    def _guided(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        request = self.request
        if request.guidance == 1:
            return self._denoised(x, t, request.prompt)
        if self._two_calls:
            negative, positive = self._denoised(x, t, request.negative), self._denoised(x, t, request.prompt)
        else:
            both = self._joined(request.negative, request.prompt)
            negative, positive = self._denoised(torch.cat([x, x]), t, both).chunk(2)
        return negative + request.guidance * (positive - negative)

    def _joined(self, negative: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Both prompts; the very tensor of the last step, or equal values in a new one."""
        made_of = (negative, prompt, negative._version, prompt._version)
        kept = self.__dict__.get("_kept")
        if self._joined_once and kept is not None and all(a is b for a, b in zip(kept[0], made_of, strict=True)):
            found: torch.Tensor = kept[1]
            return found
        joined = torch.cat([negative, prompt])
        self._kept = (made_of, joined)
        return joined

    def _denoised(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        call = self.denoiser if self.denoiser is not None else self.transformer
        result: torch.Tensor = call(**self.arguments(x, t, prompt))
        return result

    def arguments(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> dict[str, Any]:
        """Those of one call of the denoiser."""
        named = {"tokens": prompt} if self._prompt_name == "extras" else prompt
        return {"hidden_states": x, "timestep": t.expand(len(x)), self._prompt_name: named}
