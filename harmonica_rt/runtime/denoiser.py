"""A denoiser that runs under a schedule: called like the model, over any engine."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from harmonica_rt.capture.call import CallConvention
from harmonica_rt.capture.forward import own_forward
from harmonica_rt.changes import Changes
from harmonica_rt.runtime.engine import Engine
from harmonica_rt.runtime.hooks import call_with_hooks
from harmonica_rt.runtime.session import Session
from harmonica_rt.schedule import Schedule


class Denoiser(Session):
    """The model under a schedule. Everything but the call (config, dtype, parameters(), ...) is the model's own."""

    def __init__(self, model: nn.Module, schedule: Schedule, engine: Engine) -> None:
        super().__init__(type(model).__name__, schedule, engine)
        self.model = model
        self._convention = CallConvention(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the denoiser, in the current step of the current run. Arguments and result are the model's.

        Raises:
            RunError: the call cannot belong to the current run (steps used up, timesteps turned back, a failed run).
            ScheduleMismatchError: the pipeline asked for another number of steps than the schedule has.
            ConcurrentRunError: another thread is using this denoiser.
            CaptureError: in strict mode, the model cannot be captured.
        """
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            return call_with_hooks(self.model, self._forward, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "model" not in self.__dict__:
            raise AttributeError(name)
        value = getattr(self.model, name)
        if getattr(value, "__self__", None) is not self.model:
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            """`to`, `half`, `eval` and the like return the module itself: here, that is this denoiser."""
            result = value(*args, **kwargs)
            return self if result is self.model else result

        return method

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self._convention.normalise(args, kwargs)
        return self._call(call, lambda: own_forward(self.model)(**call.kwargs))
