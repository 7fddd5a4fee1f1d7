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

    def say_not_called(self, scheduler: str, model: str) -> None:
        """A scheduler took a step, and the compiled model was not called."""
        self.say(
            "not called",
            "%s took a step without a call of the compiled %s. If its pipeline was given another denoiser after it "
            "was compiled (pipe.transformer = ...), compile the pipeline again: until then it runs uncached",
            scheduler,
            model,
        )

    def say_outside(self, model: str, *, swapped: bool) -> None:
        """A call belongs to no run; with `swapped`, to one that began before the model was compiled."""
        if swapped:
            self.say(
                "swapped",
                "%s was compiled in the middle of a run of its pipeline: the rest of that run is uncached, and the "
                "schedule applies from the next run on. To treat some steps differently, use one schedule that does",
                model,
            )
            return
        self.say(
            "outside",
            "%s was called outside a sampling run (its pipeline's scheduler set no timesteps, or the call came from a "
            "callback, from after the run, or from a pipeline that was not compiled): such calls run the plain model, "
            "and nothing is cached",
            model,
        )
