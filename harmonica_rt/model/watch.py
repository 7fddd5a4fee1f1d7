"""Checks, before every call of a run, whether the model is still what it was at the last call.

Callbacks, guiders and adapters change a model mid-run. So it is checked each time, in a way that costs next to
nothing if nothing changed: the containers that hold what the forward may use still hold the very same objects, and no
parameter or buffer was written to. Otherwise the model is inspected again, and it is either in a known state (adapters
switched back) or in a new one. One change goes unnoticed: writing to a parameter through `.data`, or assigning `.data`,
which looks like a move of the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harmonica_rt.changes import Changes
from harmonica_rt.model.facts import Facts
from harmonica_rt.model.forward import own_forward
from harmonica_rt.model.identity import contents, first_change
from harmonica_rt.model.scope import UNUSED, UNUSED_OF_ROOT
from harmonica_rt.model.tensors import TensorNote, named_tensors, same_objects
from harmonica_rt.torch_state import take_capture_lock

KNOWN_STATES = 16  # kept to be recognised again; the least recently used is dropped


class ModelState:
    """The state of a model during some calls: its facts and its tensors. A stream belongs to one such state.

    Attributes:
        facts: the facts that plans are made for; the same for all states that differ only in the values of parameters.
    """

    def __init__(self, facts: Facts, tensors: TensorNote) -> None:
        self.facts = facts
        self._note = tensors

    def become(self, facts: Facts, tensors: TensorNote) -> None:
        """Take over new facts and tensors, after the model changed itself."""
        self.facts, self._note = facts, tensors

    def has(self, tensors: TensorNote) -> bool:
        """Whether this state had these very tensors, not written to since."""
        return self._note.same_as(tensors)


class ModelWatch:
    """Watches one model for changes.

    Attributes:
        model: the model.
        difference: a description of how the latest facts differ from those before; None until they first change.
    """

    def __init__(self, model: nn.Module) -> None:
        self.difference: str | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self.model = model
        self._known: list[Facts] = []
        self._states: list[ModelState] = []
        self._current: ModelState | None = None
        self._now: Facts | None = None
        self._note = TensorNote([])
        self._own_forward: Any = None

    def live_tensors(self) -> dict[str, torch.Tensor]:
        """The model's parameters and buffers by name, as of the last look; a new dict if one was replaced or moved."""
        if self._current is None:
            self.look()
        return self._tensors

    def look(self) -> ModelState:
        """The state that the model is in."""
        if self._current is None or not self._untouched():
            changes = Changes()
            with changes, changes:
                take_capture_lock(changes)  # a trace in another thread patches methods of all modules
                if self._current is None or not self._untouched():
                    now = self._inspect()
                    self._current = self._state_of(self._recognised(now))
                    self._now = now  # last, so that after an interruption the next look inspects it again
        return self._current

    def knows(self, facts: Facts | None) -> bool:
        """Whether a model with these facts would be recognised."""
        return any(known is facts for known in self._known)

    def begin_run(self, *, look: bool = True) -> None:
        """Drop all states but the current one: no stream of theirs is left. Their facts are still recognised.

        Args:
            look: look at the model first; without, the current state is that of the last look.
        """
        if look:
            self.look()
        self._states = [self._current] if self._current is not None else []

    def accept(self) -> None:
        """Accept the changes that the model made to itself while it ran: the current state takes them over."""
        if self._current is None or self._untouched():
            return
        changes = Changes()
        with changes, changes:
            take_capture_lock(changes)  # as in `look`
            if not self._untouched():
                now = self._inspect()
                self._current.become(self._recognised(now), self._note)
                self._now = now

    def _untouched(self) -> bool:
        now = self._now
        if now is None or _innermost(self.model) is not self._own_forward:
            return False
        changed = -1
        while (index := first_change(now.containers, now.noted, now.versions)) >= 0:
            if index <= changed or not self._is_harmless(now, index):
                return False
            changed = index
        return self._note.hold() and now.hidden_hold()

    def _is_harmless(self, facts: Facts, index: int) -> bool:
        """Whether a container's new objects equal the old ones or are used by no forward. If so, notes them."""
        container, before = facts.containers[index], facts.noted[index]
        now = contents(container)
        if len(now) != len(before):
            return False
        unused: frozenset[str] = frozenset()
        if isinstance(container, nn.Module):
            unused = UNUSED_OF_ROOT if container is self.model else UNUSED
        # In a module's contents, after its class, each value follows its key.
        for position, (old, new) in enumerate(zip(before, now, strict=True)):
            if old is not new and not _equal(old, new) and (position == 0 or now[position - 1] not in unused):
                return False
        facts.noted[index] = now
        return True

    def _state_of(self, facts: Facts) -> ModelState:
        """The state with these facts and the tensors just found: a known one if there is one, else a new one."""
        before = self._current
        if before is not None and facts is not before.facts:
            self.difference = next(before.facts.differences(facts), None)
        for state in self._states:
            if state.facts is facts and state.has(self._note):
                return state
        state = ModelState(facts, self._note)
        self._states = [*self._states[1 - KNOWN_STATES :], state]
        return state

    def _inspect(self) -> Facts:
        """The facts of the model now, including the containers that show when they no longer hold."""
        before, self._now = self._now, None  # first, so that an interruption does not leave released facts in use
        if before is not None:
            before.let_go()
        return Facts(self.model)

    def _recognised(self, now: Facts) -> Facts:
        """Earlier facts that equal `now`, or `now` itself if there are none. Notes the current tensors and forward."""
        self._own_forward = _innermost(self.model)
        tensors = named_tensors(self.model)
        held, before = self._tensors, self._note
        self._note = TensorNote([*tensors.values(), *now.tensors])
        replaced = tensors.keys() != held.keys() or not same_objects(tensors.values(), held.values())
        if replaced or self._note.has_moved_since(before):
            self._tensors = tensors
        facts = next((known for known in self._known if known.same_as(now)), now)
        self._known = [*(known for known in self._known if known is not facts), facts][-KNOWN_STATES:]
        return facts


def _innermost(model: nn.Module) -> Any:
    forward = own_forward(model)
    return getattr(forward, "__func__", forward)


def _equal(a: Any, b: Any) -> bool:
    """Whether two plain numbers or texts are equal. Containers never are: a copy may change on its own."""
    return type(a) is type(b) and isinstance(a, (bool, int, float, str, bytes)) and repr(a) == repr(b)
