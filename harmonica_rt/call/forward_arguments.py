"""The arguments that a model's forward takes, by position and by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from harmonica_rt.errors import SignatureError


@dataclass(frozen=True)
class ForwardArguments:
    """What a model's forward takes.

    Attributes:
        order: each argument's name, `*args` and `**kwargs` included -> its position in the signature.
        positional: names of those that may be passed by position.
        named: names of all but `*args` and `**kwargs`.
        required: names of those without a default.
        any_position: whether it takes `*args`.
        any_name: whether it takes `**kwargs`.
    """

    order: Mapping[str, int]
    positional: tuple[str, ...]
    named: frozenset[str]
    required: tuple[str, ...]
    any_position: bool
    any_name: bool

    @classmethod
    def of(cls, model: nn.Module) -> ForwardArguments:
        """The arguments of a model's forward, or of its only child's if it takes just `*args` and `**kwargs`."""
        taken = _parameters_of(model)
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named = [p for p in taken if p.kind not in several]
        return cls(
            order={p.name: i for i, p in enumerate(taken)},
            positional=tuple(p.name for p in taken if p.kind in by_position),
            named=frozenset(p.name for p in named),
            required=tuple(p.name for p in named if p.default is inspect.Parameter.empty),
            any_position=any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in taken),
            any_name=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken),
        )

    def open_to_any_name(self) -> ForwardArguments:
        """The same, but any name may be given and none is required: a graph of dynamo takes tensors at dotted paths."""
        return dataclasses.replace(self, any_name=True, required=())

    def bind(self, model_name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one call by name, in the order in which they were given.

        Raises:
            SignatureError: an argument is unknown, missing, given twice or nameless (`*args`).
        """
        if len(args) > len(self.positional) and self.any_position:
            raise SignatureError(
                f"the forward of {model_name} takes *args, so an argument passed by position has no name. Pass "
                "arguments by name, name them in that forward, give it the signature of what it wraps "
                "(functools.wraps), or compile the model inside"
            )
        if len(args) > len(self.positional):
            raise SignatureError(
                f"{model_name} takes at most {len(self.positional)} positional arguments, got {len(args)}"
            )
        bound = dict(zip(self.positional, args, strict=False))
        for name, value in kwargs.items():
            if name in bound:
                raise SignatureError(f"{model_name} was given {name!r} twice, by position and by name")
            if name not in self.named and not self.any_name:
                raise SignatureError(f"{model_name} takes no argument {name!r}; it takes {sorted(self.named)}")
            bound[name] = value
        for name in self.required:
            if name not in bound:
                raise SignatureError(f"{model_name} needs the argument {name!r}")
        return bound


def _parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    taken = list(inspect.signature(type(model).forward).parameters.values())[1:]
    children, anything = list(model.children()), {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if len(children) != 1 or {p.kind for p in taken} != anything:
        return taken
    inside = _parameters_of(children[0])
    named = any(p.kind is p.POSITIONAL_OR_KEYWORD for p in inside)
    return inside if named and not isinstance(children[0], (nn.Sequential, nn.ModuleList)) else taken
