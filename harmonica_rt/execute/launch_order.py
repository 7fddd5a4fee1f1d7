"""The order of launches on memory that outlives a call, whatever CUDA stream each call is launched on.

A CUDA stream runs its launches one after the other; two CUDA streams run independently of each other. Slots, hoisted
values and the inputs of graphs are written again in every run, so a run on another CUDA stream than the last one would
overwrite what the last one is still reading. Therefore every use of such memory takes a turn: it waits, on the device
and not on the host, until the turn before it is done. The caching allocator is notified as well: it hands freed memory
to the next launch on the CUDA stream that allocated it, unless it knows of other CUDA streams that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NO_TURN = nullcontext()


def has_streams(device: torch.device) -> bool:
    """Whether launches on `device` go to CUDA streams."""
    return device.type == "cuda"


class LaunchOrder:
    """Makes the uses of a piece of memory take turns.

    Args:
        devices: where the memory lies, and where it is used. Those without CUDA streams need no order.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = tuple(device for device in devices if has_streams(device))
        self._last: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}
        self._one_stream = True  # whether all turns so far were launched on one CUDA stream per device

    def turn(self, held: Callable[[], Iterable[torch.Tensor]]) -> AbstractContextManager[None]:
        """One turn: whatever uses the memory is launched within this block.

        Args:
            held: returns the tensors in use; called only if turns are launched on several CUDA streams.
        """
        return self._turn(held) if self._devices else _NO_TURN

    @contextmanager
    def _turn(self, held: Callable[[], Iterable[torch.Tensor]]) -> Iterator[None]:
        uses = [self._take_over(device, held) for device in self._devices]
        try:
            yield
        finally:
            for stream, event in uses:
                event.record(stream)

    def _take_over(
        self, device: torch.device, held: Callable[[], Iterable[torch.Tensor]]
    ) -> tuple[torch.cuda.Stream, torch.cuda.Event]:
        """Wait for the last turn on `device`; return its CUDA stream and the event to record when this turn ends."""
        stream = torch.cuda.current_stream(device)
        last, event = self._last.get(device, (stream, None))
        if event is None:
            event = torch.cuda.Event()
        elif last != stream:
            self._one_stream = False
            stream.wait_event(event)
        if not self._one_stream:  # whatever the last turn used: this one may use other tensors
            for tensor in held():
                if tensor.device == device:
                    tensor.record_stream(stream)
        self._last[device] = stream, event
        return stream, event
