"""Triton's own launcher over a driver that only writes down what it is asked to launch (`stub_libcuda.c`).

Hazard: the stub and Triton's active driver stay for the rest of the process, so only processes of their own install it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

SOURCE = Path(__file__).with_name("stub_libcuda.c")
FOLDER = Path(__file__).parents[2] / "build" / "stub_driver"
CAPABILITY = (9, 0)
MOST_PARAMETERS = 512


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("values", ctypes.c_uint64 * MOST_PARAMETERS),
    )


@dataclass(frozen=True)
class Launch:
    """One launch as the driver sees it.

    Attributes:
        grid, block: sizes.
        shared: bytes of dynamic shared memory.
        parameters: (bytes, value) of each parameter of the compiled kernel; values are unsigned.
    """

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    parameters: tuple[tuple[int, int], ...]


class StubDriver:
    """Installs itself as Triton's driver."""

    def __init__(self) -> None:
        folder = _built()
        self._library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        self._library.stub_launch.restype = ctypes.POINTER(_Launch)
        self._library.stub_layout.argtypes = (ctypes.c_uint64, ctypes.c_uint, ctypes.POINTER(ctypes.c_uint))
        self._sizes: dict[int, tuple[int, ...]] = {}
        triton.knobs.nvidia.libcuda_path = str(folder)
        triton.knobs.cache.dir = str(FOLDER / f"cache-{triton.__version__}")
        from triton.backends.nvidia.driver import CudaDriver

        driver = CudaDriver()
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda device: 0
        driver.get_device_capability = lambda device=0: CAPABILITY
        self._load = driver.utils.load_binary
        driver.utils.load_binary = self._load_binary
        triton.runtime.driver.set_active(driver)

    def launches(self) -> list[Launch]:
        """The launches since the last call."""
        found = [self._launch(index) for index in range(self._library.stub_launches())]
        self.clear()
        return found

    def clear(self) -> None:
        """Forget the launches; there is room for 64."""
        self._library.stub_clear()

    def _launch(self, index: int) -> Launch:
        raw = self._library.stub_launch(index).contents
        sizes = self._sizes[raw.function]
        parameters = tuple(zip(sizes, raw.values[: len(sizes)], strict=True))
        return Launch(tuple(raw.grid), tuple(raw.block), raw.shared, parameters)

    def _load_binary(self, name: str, cubin: bytes, *others: Any) -> Any:
        loaded = self._load(name, cubin, *others)
        sizes = tuple(size for _, size in sorted(parameter_sizes(cubin, name)))
        self._sizes[loaded[1]] = sizes
        if self._library.stub_layout(loaded[1], len(sizes), (ctypes.c_uint * len(sizes))(*sizes)):
            raise RuntimeError("more kernels or parameters than the stub has room for")
        return loaded


def parameter_sizes(cubin: bytes, name: str) -> Iterator[tuple[int, int]]:
    """(number, bytes) of each parameter of a kernel, as its cubin states them (`EIATTR_KPARAM_INFO` in `.nv.info`)."""
    info = _section(cubin, f".nv.info.{name}")
    at = 0
    while at < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        if (kind, attribute) == (4, 0x17):
            _, ordinal, _, packed = struct.unpack_from("<IHHI", info, at + 4)
            yield ordinal, packed >> 18
        at += 4 + (size if kind == 4 else 0)


def _section(elf: bytes, wanted: str) -> bytes:
    (headers,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    table = [struct.unpack_from("<II4Q", elf, headers + number * entry) for number in range(count)]
    text = table[names][4]
    for title, _, _, _, offset, size in table:
        if elf[text + title : elf.index(b"\0", text + title)].decode() == wanted:
            return elf[offset : offset + size]
    raise KeyError(wanted)


def _built() -> Path:
    """The folder of the compiled stub, under both names that linkers look for; made once and kept in `build/`."""
    folder = FOLDER / hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    if not folder.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            unfinished = Path(scratch) / "made"
            unfinished.mkdir()
            library = unfinished / "libcuda.so.1"
            soname = "-Wl,-soname,libcuda.so.1"
            command = (os.environ.get("CC", "gcc"), "-O1", "-shared", "-fPIC", soname, SOURCE, "-o", library)
            subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
            (unfinished / "libcuda.so").symlink_to(library.name)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    return folder
