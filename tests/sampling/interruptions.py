"""Interrupts an operation at its lines: a KeyboardInterrupt before the n-th line that runs, once for each chosen n.

Lines of this package and of `contextlib` count, each the first and the last time that it runs. A sample of them is
interrupted, half of it in the files that change something for a while and put it back.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo.convert_frame import compile_lock
from torch._subclasses.fake_tensor import FakeTensor

import harmonica_rt as hrt

TRACED = (str(Path(hrt.__file__).parent), contextlib.__file__)
UNDOING = ("changes.py", "torch_state.py", "reference_engine.py", "contextlib.py")  # change things and put them back

Place = tuple[str, int]


class Tracer:
    """Notes the lines that run, and raises KeyboardInterrupt before the one with index `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.lines: list[Place] = []
        self._at = at

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Called by Python for each new frame."""
        return self._line if frame.f_code.co_filename.startswith(TRACED) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) - 1 == self._at:
                raise KeyboardInterrupt
        return self._line

    def run(self, operation: Callable[[], object]) -> list[Place]:
        """The lines of an operation, up to where it was interrupted."""
        sys.settrace(self)
        try:
            operation()
        except KeyboardInterrupt:
            assert self._at is not None
        finally:
            sys.settrace(None)
        return self.lines


def chosen(lines: list[Place], most: int) -> list[int]:
    """Where to interrupt an operation that runs these lines: up to `most` that undo, and up to `most` of all."""
    first = dict(zip(reversed(lines), reversed(range(len(lines))), strict=True))
    last = dict(zip(lines, range(len(lines)), strict=True))
    indices = sorted({*first.values(), *last.values()})
    undoing = [i for i in indices if lines[i][0].endswith(UNDOING)]
    draw = random.Random(0)
    return sorted({i for some in (undoing, indices) for i in draw.sample(some, min(most, len(some)))})


def interruptions(
    operation: Callable[[], object], most: int, prepare: Callable[[], object] = lambda: None
) -> Iterator[str]:
    """Yields after each interruption of `operation`, prepared anew each time; where it came."""
    prepare()
    lines = Tracer().run(operation)
    assert len(lines) > 10, "the tracer sees nothing of this package"
    for index in chosen(lines, most):
        prepare()
        Tracer(index).run(operation)
        file, line = lines[index]
        yield f"interrupted before {file}:{line}"


def state(model: nn.Module) -> list[Any]:
    """All that an interruption might leave changed, in the model and in this thread."""
    held = [(name, list(module.__dict__.items())) for name, module in model.named_modules()]
    seen = [
        (path, name, sorted(value, key=str) if isinstance(value, dict) else id(value))
        for path, items in held
        for name, value in items
    ]
    return [
        seen,
        FakeTensor.__dict__["tolist"],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.is_autocast_enabled("cpu"),
        compile_lock._is_owned(),
    ]
