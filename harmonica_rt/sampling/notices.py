"""Log messages that appear only once: repeated at every call or every run, they would fill the log."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class Notices:
    """The notices of one session; each kind is logged once, as a warning."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, kind: str, message: str, *arguments: object) -> None:
        """Log a message, unless one of the same kind was logged before."""
        if kind not in self._said:
            self._said.add(kind)
            log.warning(message, *arguments)
