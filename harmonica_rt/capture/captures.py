"""Captured models, kept for all schedules of one model: another schedule needs no other capture.

Whoever compiles a model holds its captures, and they are freed with the last holder. They do not hang on the model,
which stays as its user made it.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import nn

from harmonica_rt.call.call import Call, Signature
from harmonica_rt.capture.capture import capture_model
from harmonica_rt.capture.captured_graph import CapturedModel
from harmonica_rt.model.facts import Facts
from harmonica_rt.model.watch import ModelState, ModelWatch

MOST = 8  # captures of one model that are kept


class _Kept(NamedTuple):
    signature: Signature
    facts: Facts
    captured: CapturedModel

    def holds(self, facts: Facts, call: Call) -> bool:
        """Whether the capture holds for a model with these facts and for this call."""
        values = self.captured.request_values
        if self.signature != call.signature or not (self.facts is facts or self.facts.same_as(facts)):
            return False
        return values is None or values.hold(call.leaves)


class Captures:
    """The captures of one model, the least recently used first."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []

    def get(self, watch: ModelWatch, state: ModelState, call: Call) -> tuple[CapturedModel, bool]:
        """The model of `watch`, in `state`, captured for the signature of `call`, and whether it was kept.

        Raises:
            CaptureError: the model cannot be captured.
        """
        for kept in self._kept:
            if kept.holds(state.facts, call):
                self._keep(kept)
                return kept.captured, True
        captured = capture_model(watch.model, call)
        watch.accept()  # a model may build tables when it first runs
        self._keep(_Kept(call.signature, state.facts, captured))
        return captured, False

    def _keep(self, newest: _Kept) -> None:
        others = [kept for kept in self._kept if kept is not newest]
        self._kept = [*others, newest][-MOST:]


_held: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Captures]] = weakref.WeakKeyDictionary()


def captures_of(model: nn.Module) -> Captures:
    """The captures of a model, which all who hold them at the same time share."""
    reference = _held.get(model)
    found = reference() if reference is not None else None
    if found is None:
        found = Captures()
        _held[model] = weakref.ref(found)
    return found
