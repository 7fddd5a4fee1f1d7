"""What lies inside a module that others wrapped: a plan is made for the model, and the wrapper stays around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PASS_ON = ("torch.nn.parallel.distributed",)


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's `OptimizedModule`, a `PeftModel` or `DistributedDataParallel`, however deep.

    Each of these calls what it wraps with the arguments that it got, and returns what that returned. A wrapper of
    another class may do something with them, so it is taken for the model itself.
    """
    inner = _inside(model)
    while inner is not None:
        model, inner = inner, _inside(inner)
    return model


def compiled_around(model: Any) -> list[Any]:
    """The `OptimizedModule`s among the wrappers of a model, outermost first."""
    return [wrapper for wrapper in wrappers(model) if "_orig_mod" in wrapper._modules]


def wrappers(model: Any) -> list[Any]:
    """What is around the model inside, outermost first."""
    found = []
    while (inner := _inside(model)) is not None:
        found.append(model)
        model = inner
    return found


def _inside(model: Any) -> Any | None:
    children: Mapping[str, Any] = getattr(model, "__dict__", {}).get("_modules") or {}
    if (compiled := children.get("_orig_mod")) is not None:
        return compiled
    # Where its forward is: a class derived from one of these may do something else.
    home = str(getattr(getattr(type(model), "forward", None), "__module__", ""))
    if "base_model" in children and home.startswith("peft."):
        return model.get_base_model()
    return children.get("module") if home.startswith(_PASS_ON) else None
