"""Files of safetensors, tensors and a header of text: to read one runs no code, and all damage is one kind of error."""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmonica_rt.untrusted.text import one_line

# What safetensors and torch raise for headers, sizes and types that cannot be: a damaged file is any of these.
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
    """A file that is no complete file of safetensors, or holds what torch cannot."""


def read(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, and the header's text by key.

    The tensors are copies: the file's own memory is mapped, and aligned as the header happens to be long.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not a complete file of safetensors, or its tensors are not for this torch.
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
