"""The ops on CUDA: their Triton kernels, imported at the first call so that importing the ops stays light."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from harmonica_kernels._library import LIBRARY


def implement_with_triton(op: str) -> None:
    """Let `op` run `<op>_triton` of its folder on CUDA; without Triton, its reference runs there as before."""

    def run(*arguments: Any, **options: Any) -> Any:
        module = import_module(f"harmonica_kernels.{op}.triton")
        return getattr(module, f"{op}_triton")(*arguments, **options)

    if find_spec("triton") is not None:
        LIBRARY.impl(op, run, "CUDA")
