"""The prologue as runnable code: the values of a request, and those of the timesteps, one step or all at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from harmonica_rt.graph.facts import value_of
from harmonica_rt.lower.hoist import Part, Prologue
from harmonica_rt.lower.joined_products import JoinedTensor

log = logging.getLogger(__name__)

Values = list[torch.Tensor]


class LoweredPart:
    """A part of the prologue, ready to run."""

    def __init__(self, part: Part, root: nn.Module) -> None:
        self.part = part
        self.run: Callable[..., tuple[torch.Tensor, ...]] = fx.GraphModule(root, part.graph, "Prologue").forward

    def bind(self, parameters: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """See `TabledGraph.bind`."""
        return self.part.bind(parameters, constants)


class JoinedParts:
    """The parameters that joined tensors are made of.

    Args:
        tensors: the joined tensors.

    Attributes:
        tensors: as given.
    """

    def __init__(self, tensors: Sequence[JoinedTensor]) -> None:
        self.tensors = tuple(tensors)

    def bind(self, parameters: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """For each joined tensor, a tuple of its parts; another object where a parameter was replaced or moved."""
        return tuple(tuple(parameters[name] for name in tensor.parameters) for tensor in self.tensors)

    def by_name(self, bound: tuple[Any, ...]) -> dict[str, tuple[torch.Tensor, ...]]:
        """The parts of each joined tensor by its name."""
        return {tensor.name: parts for tensor, parts in zip(self.tensors, bound, strict=True)}


class LoweredPrologue:
    """A prologue, ready to run for one step or for all steps at once.

    Args:
        prologue: what to hoist.
        root: module that `get_attr` nodes refer to.

    Attributes:
        prologue: as given.
        once: computes the values of a request.
        each: computes the values of one step, which depend on its timestep.
        joined: what joined tensors are made of.
        batches: whether `each` can run for all steps at once; True until an operator lacks a batching rule.
    """

    def __init__(self, prologue: Prologue, root: nn.Module) -> None:
        self.prologue = prologue
        self.once = LoweredPart(prologue.once, root)
        self.each = LoweredPart(prologue.each, root)
        self.joined = JoinedParts(prologue.joined)
        # A batched linear layer adds its bias outside of what autocast casts, so its result is wider than in one step.
        results: Any = prologue.each.graph.output_node().args[0]
        self._dtypes = [value_of(node).dtype for node in results]
        self.batches = True
        self._has_batched = False

    def of_request(self, bound: tuple[Any, ...], leaves: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The values of a request by name."""
        inputs = [leaves[index] for index in self.once.part.inputs]
        return dict(zip(self.once.part.results, self.once.run(*bound, *inputs), strict=True))

    def given(self, of_request: Mapping[str, torch.Tensor]) -> Values:
        """Those values of a request that the timestep part takes."""
        return [of_request[name] for name in self.each.part.given]

    def in_steps(
        self, foreseen: Sequence[torch.Tensor], bound: tuple[Any, ...], leaves: Sequence[Any], given: Values
    ) -> tuple[torch.Tensor, ...] | None:
        """The values of every step of a forecast, `[steps, ...]` each; None if the graph cannot be batched."""
        if not self.batches:
            return None
        part = self.each.part
        stacked = dict(zip(self.prologue.timesteps, foreseen, strict=True))
        inputs = [stacked.get(index, leaves[index]) for index in part.inputs]
        dims = (
            *(None for _ in bound),
            *(0 if index in stacked else None for index in part.inputs),
            *(None for _ in given),
        )
        try:
            batched = torch.vmap(self.each.run, in_dims=dims)(*bound, *inputs, *given)
        except (RuntimeError, NotImplementedError) as error:  # raised by an operator without a batching rule
            if self._has_batched or isinstance(error, torch.OutOfMemoryError):
                raise
            log.info("timestep-only values are computed step by step: %s", str(error).partition("\n")[0])
            self.batches = False
            return None
        self._has_batched = True
        return tuple(value.to(dtype) for value, dtype in zip(batched, self._dtypes, strict=True))
