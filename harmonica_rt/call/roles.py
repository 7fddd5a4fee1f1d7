"""The roles of a denoiser's arguments in a run, derived from their names.

Nothing in a call says which tensors change from step to step. Mistaking a tensor that stays the same for one that
changes would reuse features across a change of it: a wrong image. The reverse mistake only costs time. So every
argument counts as part of the request, and a change of it as a new request, unless its name says that it changes with
the latents. Such names are few: the latents come first; timesteps are named as such; a ControlNet's residuals are
computed from the latents in every step; and models that denoise several things at once name the others after what they
are (`audio_hidden_states`).
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterable

import torch

from harmonica_rt.call.call import Call

# Names of arguments that may precede the latents and must not be taken for them.
_REQUEST = re.compile(
    r"encoder|prompt|class|label|pooled|text|caption|embeds|context|mask|_ids$|guidance|resolution|aspect_ratio|rotary"
    r"|^y$|^cond|^prior",
    re.IGNORECASE,
)
# The original ControlNet calls its residuals `control`.
_RESIDUAL = re.compile(r"controlnet|additional_residual|^control(\.|$)", re.IGNORECASE)
_TIMESTEP = re.compile(
    r"^t$|^(\w+_)?(time_?steps?|times?|sigmas?)(_r|_ratio)?$|^noise_(levels?|labels)$", re.IGNORECASE
)
# LTX-2, Kandinsky 6 and MiniMax-H3; Cosmos 3; La-Proteina.
_FURTHER_LATENTS = re.compile(
    r"^(audio|video)_(hidden_states|latents)$|^(vision|sound|action)_tokens$|^local_latents$|^noisy_(?!.*index)",
    re.IGNORECASE,
)


class Role(enum.Enum):
    """The role of a tensor argument in a run."""

    LATENTS = "latents"  # changes in every step
    TIMESTEP = "timestep"  # changes in every step, and can be known before the run
    REQUEST = "request"  # the same in all steps; a stream starts anew if it changes (`sampling.conditioning`)


def sampled_arguments(arguments: Iterable[str]) -> tuple[str | None, str | None]:
    """The names of the latents and of the timestep among the arguments of a model's forward; None for one it lacks."""
    names = list(arguments)
    latents = next((name for name in names if not _says_otherwise(name)), None)
    return latents, next((name for name in names if _TIMESTEP.match(name)), None)


def roles(call: Call) -> tuple[Role, ...]:
    """The role of each leaf of a call. Leaves that are not tensors get a role by their names as well."""
    paths = call.paths
    latents = _latents(call, paths)
    return tuple(_role(path, latents) for path in paths)


@functools.lru_cache(maxsize=1024)
def _role(path: str, latents: str | None) -> Role:
    name = _name(path)
    among_others = "." in path and _says_otherwise(name)  # in a dict that holds the latents and other arguments
    if (_root(path) == latents and not among_others) or _RESIDUAL.search(path) or _FURTHER_LATENTS.match(name):
        return Role.LATENTS
    return Role.TIMESTEP if _TIMESTEP.match(name) else Role.REQUEST


def _latents(call: Call, paths: tuple[str, ...]) -> str | None:
    """The first argument of the model's forward that holds tensors and whose name does not indicate another role."""
    held = [_root(path) for path, leaf in zip(paths, call.leaves, strict=True) if isinstance(leaf, torch.Tensor)]
    in_order = [name for name in call.convention.arguments if name in held]
    return next((name for name in (*in_order, *held) if not _says_otherwise(name)), None)


def _says_otherwise(name: str) -> bool:
    return any(pattern.search(name) for pattern in (_REQUEST, _RESIDUAL, _TIMESTEP))


def _root(path: str) -> str:
    """The argument that contains a leaf."""
    return path.partition(".")[0]


def _name(path: str) -> str:
    """The last name on a leaf's path; positions in a list are not names."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)
