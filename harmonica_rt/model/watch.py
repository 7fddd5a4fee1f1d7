"""Is the model still what it was at the last call? Asked before every call of a run.

Callbacks, guiders and adapters change a model in mid-run. So the question is asked each time, in a way that costs next
to nothing where the answer is yes: the containers that hold what the forward may read still hold the very same objects,
and no weight was written to. Where the answer is no, the model is read anew, and it is either in a state that is known
already (adapters switched back) or in a new one. Through `.data` a weight is written, or assigned other memory, and
looks like one that was moved: that is not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harmonica_rt.changes import Changes
from harmonica_rt.model.facts import Facts
from harmonica_rt.model.forward import own_forward
from harmonica_rt.model.identity import contents, first_change
from harmonica_rt.model.tensors import TensorNote, named_tensors, same_objects
from harmonica_rt.model.walk import UNREAD, UNREAD_OF_ROOT
from harmonica_rt.torch_state import take_capture_lock

KNOWN_STATES = 16  # kept to be recognised again; the one unused longest is forgotten


class ModelState:
    """What a model was during some calls: what its forward took for granted, and its weights.

    Streams belong to one such state. Attributes:
        facts: what plans are made for; equal for all states that differ in the values of weights only.
    """

    def __init__(self, facts: Facts, weights: TensorNote) -> None:
        self.facts = facts
        self._note = weights

    def become(self, facts: Facts, weights: TensorNote) -> None:
        """The model changed by itself: this state now goes by these facts and weights."""
        self.facts, self._note = facts, weights

    def has(self, weights: TensorNote) -> bool:
        """Whether it had these very weights, not written to since."""
        return self._note.same_as(weights)


class ModelWatch:
    """Looks at one model.

    Attributes:
        difference: how the facts found last differ from those before, in words; None before there were two.
    """

    def __init__(self, model: nn.Module) -> None:
        self.difference: str | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._model = model
        self._known: list[Facts] = []
        self._states: list[ModelState] = []
        self._current: ModelState | None = None
        self._now: Facts | None = None
        self._note = TensorNote([])
        self._own_forward: Any = None

    def live_tensors(self) -> dict[str, torch.Tensor]:
        """Its parameters and buffers by name, as it last looked; the same mapping while none was replaced."""
        if self._current is None:
            self.look()
        return self._tensors

    def look(self) -> ModelState:
        """The state that the model is in."""
        if self._current is None or not self._untouched():
            changes = Changes()
            with changes, changes:
                take_capture_lock(changes)  # another thread that traces replaces methods of all modules meanwhile
                if self._current is None or not self._untouched():
                    now = self._read_anew()
                    self._current = self._state_of(self._recognised(now))
                    self._now = now  # last: whatever interrupts this, the next look reads again
        return self._current

    def knows(self, facts: Facts | None) -> bool:
        """Whether a model in this state would be recognised."""
        return any(known is facts for known in self._known)

    def begin_run(self) -> None:
        """Look at the model. No stream is left of earlier states: nothing is kept of them but their facts."""
        self._states = [self.look()]

    def accept(self) -> None:
        """The model changed by itself, while it ran: that makes no other state of the current one."""
        if self._current is None or self._untouched():
            return
        changes = Changes()
        with changes, changes:
            take_capture_lock(changes)  # as in `look`
            if not self._untouched():
                now = self._read_anew()
                self._current.become(self._recognised(now), self._note)
                self._now = now

    def _untouched(self) -> bool:
        now = self._now
        if now is None or _innermost(self._model) is not self._own_forward:
            return False
        changed = -1
        while (index := first_change(now.containers, now.noted, now.versions)) >= 0:
            if index <= changed or not self._is_harmless(now, index):
                return False
            changed = index
        return self._note.hold() and now.hidden_hold()

    def _is_harmless(self, facts: Facts, index: int) -> bool:
        """Whether a container has other objects, yet equal ones, or such as no forward reads. Takes note of them."""
        container, before = facts.containers[index], facts.noted[index]
        now = contents(container)
        if len(now) != len(before):
            return False
        unread: frozenset[str] = frozenset()
        if isinstance(container, nn.Module):
            unread = UNREAD_OF_ROOT if container is self._model else UNREAD
        for place, (old, new) in enumerate(zip(before, now, strict=True)):
            if old is not new and not _equal(old, new) and (place == 0 or now[place - 1] not in unread):
                return False
        facts.noted[index] = now
        return True

    def _state_of(self, facts: Facts) -> ModelState:
        """The state with these facts and the weights that were found, the same one if it was there before."""
        before = self._current
        if before is not None and facts is not before.facts:
            self.difference = next(before.facts.differences(facts), None)
        for state in self._states:
            if state.facts is facts and state.has(self._note):
                return state
        state = ModelState(facts, self._note)
        self._states = [*self._states[1 - KNOWN_STATES :], state]
        return state

    def _read_anew(self) -> Facts:
        """The facts of the model now, with what tells that they no longer hold."""
        before, self._now = self._now, None  # first, or an interruption would leave facts in use that watch nothing
        if before is not None:
            before.let_go()
        return Facts(self._model)

    def _recognised(self, now: Facts) -> Facts:
        """Facts that were found before and equal these; these where there are none."""
        self._own_forward = _innermost(self._model)
        tensors = named_tensors(self._model)
        held = self._tensors
        if tensors.keys() != held.keys() or not same_objects(tensors.values(), held.values()):
            self._tensors = tensors
        self._note = TensorNote([*self._tensors.values(), *now.tensors])
        facts = next((known for known in self._known if known.same_as(now)), now)
        self._known = [*(known for known in self._known if known is not facts), facts][-KNOWN_STATES:]
        return facts


def _innermost(model: nn.Module) -> Any:
    forward = own_forward(model)
    return getattr(forward, "__func__", forward)


def _equal(a: Any, b: Any) -> bool:
    """Whether two plain numbers or texts are the same; a copy of a container is another one, which may change."""
    return type(a) is type(b) and isinstance(a, (bool, int, float, str, bytes)) and repr(a) == repr(b)
