"""Resident memory of this process, now and at its peak."""

from __future__ import annotations

import threading
import time
from pathlib import Path


class PeakMemory:
    """Largest resident size of this process within a `with` block.

    Attributes:
        peak: bytes, sampled every 5 ms.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, resident_bytes())
            if self._done.is_set():
                return
            time.sleep(0.005)


def resident_bytes() -> int:
    """Resident size of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not report the resident size of a process")
