"""The parameters and constants of the current run, as the programs of a plan take them.

Hazard: a model's parameters may be replaced or moved between runs or in the middle of one. Programs are bound to
tensors, and graphs hold their addresses. Both see a tensor that was written in place, but programs see none that was
replaced, and graphs none that was moved. On a GPU a step is launched before the model is checked, so graphs may read
memory that no tensor has any more: it is kept until the run is over or the move is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

Parameters = Callable[[], Mapping[str, torch.Tensor]]


class Bindable(Protocol):
    """Something that takes parameters and constants in an order of its own."""

    def bind(self, parameters: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """The parameters and constants that it takes, in its order."""


class ParameterBinding:
    """What the programs of a plan are bound to in the current run.

    Args:
        fetch: returns the model's parameters and buffers by name. The same mapping object means the same tensors at the
            same addresses, whatever their values.
        constants: tensors that tracing made, by name.
        on_addresses: for graphs, which hold addresses: called when a run first uses its parameters, with True if any of
            them has moved. None without graphs.
    """

    def __init__(
        self,
        fetch: Parameters,
        constants: Mapping[str, torch.Tensor],
        on_addresses: Callable[[bool], None] | None = None,
    ) -> None:
        self._fetch = fetch
        self._constants = constants
        self._on_addresses = on_addresses
        self._parameters: Mapping[str, torch.Tensor] = {}
        self._checked = False  # in this run
        self._bound: dict[Bindable, tuple[Any, ...]] = {}
        self._addresses: tuple[Any, ...] = ()
        self._kept: tuple[torch.UntypedStorage, ...] = ()  # memory that graphs read in this run

    def begin_run(self) -> None:
        """A run begins: parameters are fetched anew at their first use."""
        self._checked = False
        if self._fetch() is not self._parameters:
            self._bound.clear()  # first, or after an interruption here stale tensors would pass for current
            self._parameters = {}  # or a plan that is not used again would keep replaced parameters alive
            self._kept = ()

    def end_run(self) -> None:
        """The run is over: keep no memory that the model has given up."""
        self._checked = False
        self._kept = ()

    def of(self, program: Bindable) -> tuple[Any, ...]:
        """The parameters and constants of `program`, as the model holds them in this run."""
        if not self._checked or self._fetch() is not self._parameters:  # the latter: replaced mid-run
            self._check()
        bound = self._bound.get(program)
        if bound is None:
            bound = self._bound[program] = program.bind(self._parameters, self._constants)
        return bound

    def _check(self) -> None:
        """Fetch the parameters of this run, and tell graphs whether any have moved."""
        is_first, self._checked = not self._checked, True
        parameters = self._fetch()
        if parameters is not self._parameters:
            self._bound.clear()
            self._parameters = parameters
        if self._on_addresses is None:
            return
        addresses = (
            *(tensor.data_ptr() for tensor in parameters.values()),
            # recording reads constants on the CPU by value, so writing to one counts as a move
            *((c.data_ptr(), c._version if c.device.type == "cpu" else 0) for c in self._constants.values()),
        )
        moved = bool(self._addresses) and addresses != self._addresses
        if is_first or moved:
            self._on_addresses(moved)
        self._addresses = addresses
        self._kept = tuple(tensor.untyped_storage() for tensor in (*parameters.values(), *self._constants.values()))
