"""The `harmonica` namespace of torch operators, in which all ops of this package are registered.

It uses `Library.impl` rather than `torch.library.custom_op`, because a call takes a quarter of the time (15 us against
54 us on two CPU cores).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Final

import torch

from harmonica_kernels._build import build_info

LIBRARY: Final = torch.library.Library("harmonica", "FRAGMENT")
TAGS: Final = (torch.Tag.pt2_compliant_tag,)


def register(op: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op with its implementations per device.

    The reference runs on every device without an implementation of its own. On the CPU, the extension's runs if it was
    built; on CUDA, the Triton kernel `<op>_triton` of the op's folder runs if Triton is installed.

    Args:
        op: name of the op, and of its folder.
        schema: its arguments and results.
        reference: its definition.
        fake: makes the results for fake arguments, and raises the same errors.
    """
    # The C++ implementation calls the second op for arguments that it does not support, so that both raise the same
    # errors.
    for name in (op, f"_{op}_reference"):
        LIBRARY.define(f"{name}{schema}", tags=TAGS)
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"harmonica::{name}", fake, lib=LIBRARY)
    if not build_info().extension:
        LIBRARY.impl(op, functools.partial(_without_extension, reference), "CPU")
    if find_spec("triton") is not None:
        LIBRARY.impl(op, functools.partial(_with_triton, op), "CUDA")


def _with_triton(op: str, *arguments: Any, **options: Any) -> Any:
    """Run the Triton kernel of an op."""
    return getattr(_triton_module(op), f"{op}_triton")(*arguments, **options)


@functools.cache
def _triton_module(op: str) -> ModuleType:
    """The Triton implementation of an op, imported at its first call, so that importing the ops stays light."""
    return import_module(f"harmonica_kernels.{op}.triton")


def _without_extension(reference: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run the reference on the CPU, after a warning that the extension is missing."""
    _warn_once_without_extension()
    return reference(*arguments, **options)


@functools.cache
def _warn_once_without_extension() -> None:
    """Warn and say why, the first time that a CPU op runs as eager PyTorch, unless the user chose such a build."""
    info = build_info()
    if not info.chosen:
        warnings.warn(
            f"CPU ops of harmonica_kernels run as eager PyTorch, without the C++ extension: {info.reason}",
            RuntimeWarning,
            stacklevel=3,
        )
