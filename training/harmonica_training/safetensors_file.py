"""Reads safetensors files (tensors and a text header) without running code; any damage raises the same error."""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmonica_rt.untrusted.text import one_line

# What safetensors and torch raise for invalid headers, sizes and types; a damaged file may raise any of these.
_UNREADABLE = (
    OSError,
    SafetensorError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    OverflowError,
)


class UnreadableError(ValueError):
    """The file is not a complete safetensors file, or holds tensors that torch does not support."""


def read(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, and the text of the header by key.

    The tensors are copies: the file is memory-mapped, and its alignment depends on the length of the header.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not a complete safetensors file, or its tensors are not supported by this torch.
    """
    try:
        with safe_open(os.fspath(path), "pt", device=str(device)) as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise UnreadableError(one_line(error, 300)) from error
    return tensors, metadata
