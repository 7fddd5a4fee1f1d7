"""When an engine looks at its model, and what it has found so far in the current run."""

from __future__ import annotations

from harmonica_rt.execute.new_states import NewStates
from harmonica_rt.model.facts import Facts
from harmonica_rt.model.watch import ModelState, ModelWatch


class ModelLooks:
    """The looks at one model.

    Args:
        watch: watches the model.

    Attributes:
        watch: as given.
        new_states: the states that were new in this run.
        changed_before_run: whether the model changed between the last run and this one; then it is likely to again.
    """

    def __init__(self, watch: ModelWatch) -> None:
        self.watch = watch
        self.new_states = NewStates(type(watch.model).__name__)
        self.changed_before_run = False
        self._state: ModelState | None = None  # as the last look found it
        self._count = 0  # in this run

    @property
    def state(self) -> ModelState:
        """The state of the model as the last look found it."""
        return self._state or self.look()

    @property
    def facts(self) -> Facts | None:
        """The facts of the model as the last look found them; None before the first look."""
        return self._state.facts if self._state is not None else None

    def look(self) -> ModelState:
        """Look at the model; at the first look of a run, note whether it has changed since the last run."""
        before, self._state = self._state, self.watch.look()
        if before is not None and self._state.facts is not before.facts:
            self.new_states.change = self.watch.difference
        self._count += 1
        if self._count == 1:
            self.changed_before_run = before is not None and self._state is not before
        return self._state

    def begin_run(self, *, late: bool) -> ModelState | None:
        """A run begins. Look at the model now, unless the look may be `late`, after the first step was launched.

        Returns:
            The state of the last look, which the run assumes until the late look; None if the model was looked at now.
        """
        # a run whose first look found a change is begun again, and that look counts for it
        begins_anew = self.changed_before_run and self._count == 1
        self._count = 1 if begins_anew else 0
        known = self._state if late and not self.changed_before_run else None
        if known is None:
            self.look()
        self.watch.begin_run(look=False)
        self.new_states.begin_run()
        return known
