"""What the arguments of a denoiser are to a run, by their names.

Nothing in a call says which tensors change from step to step. Names do, across diffusers: the latents come first, the
timestep is called so, and what the request brings (prompt embeddings, class labels, masks, position ids, guidance)
has one of a few words in its name. Any other argument is taken to change in every step. The guess is never trusted: a
run compares, at every step, what it takes for unchanged. What a ControlNet adds is made anew in every step from the
latents, so it is as free to change as they are, also where it is zero for the first steps.
"""

from __future__ import annotations

import enum
import re

from harmonica_rt.capture.call import Call

_REQUEST = re.compile(
    r"encoder|prompt|class|label|pooled|text|caption|embeds|context|mask|_ids$|guidance|resolution|aspect_ratio|rotary"
    r"|^y$|^cond|^prior",
    re.IGNORECASE,
)
_RESIDUAL = re.compile(r"controlnet|additional_residual", re.IGNORECASE)
_TIMESTEP = re.compile(r"^(timesteps?|t|sigma)$", re.IGNORECASE)


class Role(enum.Enum):
    """What a tensor argument is to a run."""

    LATENTS = "latents"  # changes in every step
    TIMESTEP = "timestep"  # changes in every step, and can be known before the run
    REQUEST = "request"  # stays the same over a run


def roles(call: Call) -> tuple[Role, ...]:
    """The role of each leaf of a call. The first argument is the latents, unless its name says something else."""
    return tuple(_role(path, call.convention.first_argument) for path in call.paths)


def is_request(path: str) -> bool:
    """Whether an argument's name says that it stays the same over a run."""
    return _REQUEST.search(path) is not None and not is_residual(path)


def is_residual(path: str) -> bool:
    """Whether an argument's name says that it is what another model makes of the latents in every step."""
    return _RESIDUAL.search(path) is not None


def _role(path: str, first: str | None) -> Role:
    if is_request(path):
        return Role.REQUEST
    if path != first and _TIMESTEP.match(path):
        return Role.TIMESTEP
    return Role.LATENTS
