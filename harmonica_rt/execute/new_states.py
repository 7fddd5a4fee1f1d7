"""The states of a model that a run meets for the first time: each costs a capture, so there is a limit."""

from __future__ import annotations

import logging

from harmonica_rt.model.facts import Facts

log = logging.getLogger(__name__)

NEW_STATES = 4  # new states of the model per run that plans are made for; in further ones it runs eagerly


class NewStates:
    """The new states of one model in the current run.

    Args:
        name: name of the model in log messages.

    Attributes:
        change: the model's last change, in words, if no plan was made for it yet.
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
        """Whether the model changed so often in this run that a plan for this state would not pay."""
        if facts in self._states:
            return False
        change, self.change = self.change, None
        if len(self._states) == NEW_STATES:
            warned, self._warned = self._warned, True
            if not warned:
                log.warning(
                    "%s changed more than %d times in this run (last: %s): in a state that no plan was made for, it "
                    "runs eagerly and reuses nothing. Keep what changes in every step out of the model, or pass it as "
                    "a tensor argument",
                    *(self._name, NEW_STATES - 1, change),
                )
            return True
        self._states.append(facts)
        if change is not None:
            log.warning("%s was captured again: %s", self._name, change)
        return False
