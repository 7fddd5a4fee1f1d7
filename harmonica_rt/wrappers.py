"""Finds the denoiser in a pipeline, and the model inside its wrappers; the wrappers are left in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

DENOISER_NAMES = ("transformer", "unet", "denoiser")  # attributes of pipelines for the model that each step calls

_PASS_ON = ("torch.nn.parallel.distributed",)  # where the forwards are defined that pass all on to a child `module`


def named_denoiser(pipeline: Any, kind: type[T]) -> tuple[str, T] | None:
    """Name and value of a pipeline's first attribute in `DENOISER_NAMES` that is a `kind`; None if there is none."""
    named = ((name, getattr(pipeline, name, None)) for name in DENOISER_NAMES)
    return next(((name, held) for name, held in named if isinstance(held, kind)), None)


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's `OptimizedModule`, a `PeftModel` or `DistributedDataParallel`, at any depth.

    Each of these passes its arguments on to what it wraps and returns the result unchanged. A wrapper of another class
    may change them, so it counts as the model itself.
    """
    inner = _inside(model)
    while inner is not None:
        model, inner = inner, _inside(inner)
    return model


def compiled_around(model: Any) -> list[Any]:
    """The `OptimizedModule`s among the wrappers of a model, outermost first."""
    return [wrapper for wrapper in wrappers(model) if "_orig_mod" in wrapper._modules]


def wrappers(model: Any) -> list[Any]:
    """The wrappers around the innermost model, outermost first."""
    found = []
    while (inner := _inside(model)) is not None:
        found.append(model)
        model = inner
    return found


def _inside(model: Any) -> Any | None:
    children: Mapping[str, Any] = getattr(model, "__dict__", {}).get("_modules") or {}
    if (compiled := children.get("_orig_mod")) is not None:
        return compiled
    # Wrappers are recognised by where `forward` is defined: a derived class may define another one.
    home = str(getattr(getattr(type(model), "forward", None), "__module__", ""))
    if "base_model" in children and home.startswith("peft."):
        return model.get_base_model()
    return children.get("module") if home.startswith(_PASS_ON) else None
