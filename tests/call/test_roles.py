"""What the arguments of a denoiser are to a run: part of the request, unless they are known to move."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import diffusers.models.transformers
import diffusers.models.unets
import pytest
import torch
from torch import nn

from harmonica_rt.call.call import CallConvention
from harmonica_rt.call.roles import Role, roles

LATENTS, TIMESTEP, REQUEST = Role.LATENTS, Role.TIMESTEP, Role.REQUEST
MOVES = {
    LATENTS: {"audio_hidden_states", "vision_tokens", "sound_tokens", "action_tokens", "local_latents"},
    TIMESTEP: {
        *("timestep", "timesteps", "t", "sigma", "timestep_r", "r_timestep", "timestep_ratio"),
        *("audio_timestep", "audio_sigma", "clean_timestep", "target_timestep", "ref_fixed_timestep"),
        *("vision_timesteps", "sound_timesteps", "action_timesteps", "bb_ca_time", "local_latents_time"),
        *("decoder_noise_time", "use_cross_timestep"),
    },
}


def roles_of(forward: Any, **arguments: Any) -> dict[str, Role]:
    model: Any = type("Model", (nn.Module,), {"forward": forward})()
    call = CallConvention(model).normalise((), arguments)
    return dict(zip(call.paths, roles(call), strict=True))


def denoisers() -> list[Any]:
    found = []
    for package in (diffusers.models.transformers, diffusers.models.unets):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if "flax" not in module.name:
                found += [
                    value
                    for value in vars(importlib.import_module(module.name)).values()
                    if inspect.isclass(value) and issubclass(value, diffusers.ModelMixin)
                ]
    named = {cls.__name__: cls for cls in found if "return_dict" in inspect.signature(cls.forward).parameters}
    return [named[name] for name in sorted(named)]


@pytest.mark.parametrize("cls", denoisers(), ids=lambda cls: cls.__name__)
def test_every_argument_of_every_denoiser_of_diffusers_has_a_role(cls: Any) -> None:
    """Latents come first; what else moves is named here, ControlNets and adapters apart."""
    names = [name for name in inspect.signature(cls.forward).parameters if name not in ("self", "return_dict")]
    names = [name for name in names if "kwargs" not in name]
    found = roles_of(cls.forward, **{name: torch.zeros(1) for name in names})
    first = next(name for name in names if not name.endswith("_ids") and "mask" not in name and "text" not in name)
    for name in names:
        residual = "controlnet" in name or "additional_residual" in name
        role = next((role for role, moving in MOVES.items() if name in moving), REQUEST)
        assert found[name] is (LATENTS if name == first or residual else role), name


def test_unknown_names_are_part_of_the_request() -> None:
    def forward(self: Any, x: Any, t: Any, cap_feats: Any, anything: Any, noisy_audio: Any) -> None: ...

    one = torch.zeros(1)
    given = {"x": [one, one], "t": one, "cap_feats": [one], "anything": {"deep": [one]}, "noisy_audio": one}
    assert roles_of(forward, **given) == {
        "x.0": LATENTS,
        "x.1": LATENTS,
        "t": TIMESTEP,
        "cap_feats.0": REQUEST,
        "anything.deep.0": REQUEST,
        "noisy_audio": LATENTS,
    }


@pytest.mark.parametrize("order", [("t", "x", "context"), ("context", "t", "x"), ("context", "x", "t")], ids=" ".join)
def test_the_latents_are_the_first_argument_that_can_be(order: tuple[str, ...]) -> None:
    def forward(*_: Any, **__: Any) -> None: ...

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *order)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    found = roles_of(forward, **dict.fromkeys(order, torch.zeros(1)))
    assert found == {"t": TIMESTEP, "x": LATENTS, "context": REQUEST}


def test_timesteps_are_found_in_nested_arguments() -> None:
    def forward(self: Any, sample: Any, extra: Any, height: Any) -> None: ...

    one = torch.zeros(1)
    found = roles_of(forward, sample=one, extra={"timestep": one, "time_ids": one}, height=3)
    assert found == {"sample": LATENTS, "extra.timestep": TIMESTEP, "extra.time_ids": REQUEST, "height": REQUEST}


def test_latents_are_found_in_a_dict_with_other_tensors() -> None:
    def forward(self: Any, inputs: Any) -> None: ...

    one = torch.zeros(1)
    found = roles_of(forward, inputs={"latents": one, "prompt_embeds": one, "timestep": one, "noise": one})
    assert found == {
        "inputs.latents": LATENTS,
        "inputs.prompt_embeds": REQUEST,
        "inputs.timestep": TIMESTEP,
        "inputs.noise": LATENTS,
    }


def test_indices_of_noisy_frames_are_part_of_the_request() -> None:
    def forward(self: Any, sample: Any, noisy_frame_indexes: Any) -> None: ...

    found = roles_of(forward, sample=torch.zeros(1), noisy_frame_indexes=torch.zeros(1))
    assert found["noisy_frame_indexes"] is REQUEST
