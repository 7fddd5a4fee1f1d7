"""A normalised denoiser call: the arguments that were given, their flattened form, and the signature.

Pipelines pass latents by position, leave out `return_dict`, and nest optional tensors in dicts. Two calls may share a
plan exactly when their signatures are equal: the same arguments, tensors of the same shape, strides, dtype and device,
equal plain values everywhere else, and the same autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmonica_rt.call.forward_arguments import ForwardArguments
from harmonica_rt.errors import SignatureError

_AUTOCAST_DEVICES = ("cpu", "cuda")
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.memory_format)


@dataclass(frozen=True)
class Signature:
    """What a plan is specialised for. Calls with equal signatures share a plan.

    `leaves` has (shape, strides, dtype, device) for each tensor, and a `PlainValue` for every other leaf.
    A plan may hold only for some values of the request: `request_values` has them. In a call's signature it is empty.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    request_values: tuple[tuple[Any, ...], ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.leaves, self.autocast, self.request_values))

    @property
    def device(self) -> torch.device:
        """The device of the first tensor; the CPU if there is none."""
        return next((leaf[3] for leaf in self.leaves if type(leaf) is tuple), torch.device("cpu"))

    @contextmanager
    def in_its_autocast(self) -> Iterator[None]:
        """Set autocast, within the block, as it is in calls with this signature."""
        wanted = dict(self.autocast)
        with ExitStack() as stack:
            for device in _AUTOCAST_DEVICES:
                if device in wanted or torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype=wanted.get(device), enabled=device in wanted))
            yield

    def __str__(self) -> str:
        shapes = [
            f"{list(leaf[0])} {str(leaf[2]).removeprefix('torch.')}" for leaf in self.leaves if type(leaf) is tuple
        ]
        return ", ".join(shapes) or "no tensors"


@dataclass(frozen=True)
class Call:
    """One normalised call.

    `kwargs` holds the arguments by name, in the order of the model's forward; `leaves` is their flattened form; `paths`
    names each leaf (`encoder_hidden_states`, `added_cond_kwargs.resolution`). `convention` made it.
    """

    kwargs: dict[str, Any]
    leaves: list[Any]
    signature: Signature
    convention: CallConvention

    @property
    def paths(self) -> tuple[str, ...]:
        """Dotted argument paths, one per leaf."""
        return self.convention.paths(self)

    def plain_difference(self, other: Signature) -> str | None:
        """The first argument that differs from signature `other`, if only plain values differ; otherwise None."""
        mine = self.signature
        if mine.spec != other.spec or mine.autocast != other.autocast:
            return None
        differing = [i for i, (a, b) in enumerate(zip(mine.leaves, other.leaves, strict=True)) if a != b]
        if not differing or any(isinstance(mine.leaves[i], tuple) for i in differing):
            return None
        return self.paths[differing[0]]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The leaves that are tensors, by path."""
        return {
            path: leaf for path, leaf in zip(self.paths, self.leaves, strict=True) if isinstance(leaf, torch.Tensor)
        }


class CallConvention:
    """How one model's `forward` takes its arguments. Built once, used on every call."""

    def __init__(self, model: nn.Module) -> None:
        self._model_name = type(model).__name__
        self._forward = ForwardArguments.of(model)
        self._paths: dict[Signature, tuple[str, ...]] = {}
        self._orders: dict[tuple[str, ...], tuple[str, ...]] = {}  # names as given -> in the order of forward
        self._flat_specs: dict[tuple[str, ...], pytree.TreeSpec] = {}
        self._last: Signature | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments in the order of the model's forward; in diffusers' denoisers latents come first."""
        return tuple(self._forward.order)

    def normalise(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Bind, order and flatten one call.

        Raises:
            SignatureError: an argument is unknown, missing, given twice or nameless (`*args`), or is neither a tensor
                nor a plain value (nor a list, tuple or dict of them).
        """
        bound = self._forward.bind(self._model_name, args, kwargs)
        names = tuple(bound)
        order = self._orders.get(names)
        if order is None:
            known, last = self._forward.order, len(self._forward.order)
            order = self._orders[names] = tuple(sorted(names, key=lambda name: known.get(name, last)))
        ordered = {name: bound[name] for name in order}
        leaves, spec = self._flatten(order, ordered)
        signature = Signature(spec, tuple(map(self._leaf_key, leaves)), _autocast())
        if signature == self._last:
            signature = self._last  # the same object: its hash is cached, and it compares equal at once
        self._last = signature
        return Call(ordered, leaves, signature, self)

    def _flatten(self, names: tuple[str, ...], ordered: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
        """Flatten as pytree does, with a fast path for calls without nested arguments: most models, in every step."""
        leaves = list(ordered.values())
        if not all(isinstance(leaf, (torch.Tensor, *_PLAIN)) for leaf in leaves):
            return pytree.tree_flatten(ordered)
        spec = self._flat_specs.get(names)
        if spec is None:
            spec = self._flat_specs[names] = pytree.tree_flatten(ordered)[1]
        return leaves, spec

    def paths(self, call: Call) -> tuple[str, ...]:
        """Dotted argument paths of a call's leaves."""
        known = self._paths.get(call.signature)
        if known is None:
            with_paths, _ = pytree.tree_flatten_with_path(call.kwargs)
            known = tuple(".".join(_key_name(key) for key in path) for path, _ in with_paths)
            self._paths[call.signature] = known
        return known

    def _leaf_key(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            shape, strides = leaf.shape, leaf.stride()
            if 1 in shape:  # the stride of a dimension of size 1 is never used, so it makes no other signature
                strides = tuple(0 if n == 1 else s for n, s in zip(shape, strides, strict=True))
            return (tuple(shape), strides, leaf.dtype, leaf.device)
        if isinstance(leaf, _PLAIN):
            return PlainValue(type(leaf), leaf)
        raise SignatureError(
            f"{self._model_name} was called with an object of type {type(leaf).__name__}; a static plan can be made "
            "for tensors, numbers, strings and lists, tuples or dicts of them"
        )


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """The devices with autocast on, and its dtype on each: autocast decides the dtypes inside the graph."""
    return tuple(
        (device, torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)
    )


@dataclass(frozen=True)
class PlainValue:
    """A plain value with its type: `True == 1 == 1.0`, but each may lead to a different program."""

    type: type
    value: Any


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
