"""Counts the states of a model that are new in a run: each costs a capture, so there is a limit."""

from __future__ import annotations

import logging

from harmonica_rt.model.facts import Facts

log = logging.getLogger(__name__)

NEW_STATES = 4  # new states of a model per run that get a plan; in further ones the model runs eagerly


class NewStates:
    """The new states of one model in the current run.

    Args:
        name: name of the model in log messages.

    Attributes:
        change: the model's last change, in words; None once `is_one_too_many` has counted it.
    """

    def __init__(self, name: str) -> None:
        self.change: str | None = None
        self._name = name
        self._states: list[Facts] = []
        self._warned = False  # in this run

    def begin_run(self) -> None:
        """A run begins."""
        self._states.clear()
        self._warned = False

    def is_one_too_many(self, facts: Facts) -> bool:
        """Count a state without a plan, and log the change; True if this run had so many that a plan would not pay."""
        if facts in self._states:
            return False
        change, self.change = self.change, None
        if len(self._states) == NEW_STATES:
            warned, self._warned = self._warned, True
            if not warned:
                log.warning(
                    "%s changed more than %d times in this run (last: %s): in a state without a plan, it runs eagerly "
                    "and reuses nothing. Keep what changes at every step out of the model, or pass it as a tensor "
                    "argument",
                    *(self._name, NEW_STATES - 1, change),
                )
            return True
        self._states.append(facts)
        if change is not None:
            log.warning("%s was captured again: %s", self._name, change)
        return False
