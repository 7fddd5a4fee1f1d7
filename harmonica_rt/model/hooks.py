"""The hooks that run around a module's forward: one list, shared by all code that compares, refuses or bypasses them.

Torch keeps forward hooks and forward pre-hooks, on a module or on every module. Accelerate wraps a module's forward and
keeps its hook beside it, and diffusers keeps a registry of hooks. Backward hooks are not listed: results of a compiled
model carry no gradient, so none would run.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as every_module

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # attributes of every module: dicts of hooks
ACCELERATE_HOOK = "_hf_hook"  # attribute of a module with a hook of accelerate
DIFFUSERS_HOOKS = "_diffusers_hook"  # attribute of a module with a registry of diffusers; it may be empty


def forward_hooks(module: nn.Module) -> list[dict[int, Any]]:
    """The dicts in which torch keeps the module's own forward hooks and pre-hooks."""
    return [module.__dict__[name] for name in FORWARD_HOOKS]


def forward_hooks_of_every_module() -> list[dict[int, Any]]:
    """The dicts in which torch keeps the forward hooks and pre-hooks that run for every module of the process."""
    return [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]


def accelerate_hook(module: nn.Module) -> Any | None:
    """The hook that accelerate put on a module, or None."""
    return module.__dict__.get(ACCELERATE_HOOK)


def diffusers_hooks(module: nn.Module) -> dict[str, Any] | None:
    """The hooks that diffusers put on a module, by name; None for a module without a registry."""
    registry = module.__dict__.get(DIFFUSERS_HOOKS)
    hooks: dict[str, Any] | None = None if registry is None else registry.hooks
    return hooks


def all_hooks(module: nn.Module) -> list[Any]:
    """All hooks on a module itself."""
    found = [hook for hooks in forward_hooks(module) for hook in hooks.values()]
    found += [] if (hook := accelerate_hook(module)) is None else [hook]
    return [*found, *(diffusers_hooks(module) or {}).values()]
