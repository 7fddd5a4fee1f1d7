"""Reads the record of the build and loads the C++ extension.

Hazard: an extension assumes the memory layout of the torch headers that it was compiled against. With another release
of torch it may fail to load, or load and corrupt memory. So the build records its torch version in `_C.build.json`, and
the extension is loaded only with the same release; otherwise a warning says why it is not.
"""

from __future__ import annotations

import functools
import importlib
import json
import shlex
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

_FOLDER: Final = Path(__file__).parent
_REPOSITORY: Final = "https://github.com/harmonica-rt/harmonica-rt"
_SETUPTOOLS: Final = 77  # major version that the build needs, see pyproject.toml


@dataclass(frozen=True)
class BuildInfo:
    """State of the C++ extension that implements the ops on the CPU.

    Attributes:
        extension: True if it is loaded and runs the CPU ops.
        reason: why it is not loaded; None if it is.
        chosen: True if the user had the build leave the extension out (HARMONICA_BUILD_CSRC=0).
        compiler: first line of the compiler's `--version`; None if nothing was built.
        torch_built: version of torch that the extension was compiled against; None if nothing was built.
        torch_running: version of torch in this process.
        cpu_capability: instruction set that ATen uses here, e.g. "AVX2".
    """

    extension: bool
    reason: str | None
    chosen: bool
    compiler: str | None
    torch_built: str | None
    torch_running: str
    cpu_capability: str


def build_info() -> BuildInfo:
    """State of the C++ extension in this process; determined on import, so the call is free."""
    return _INFO


@functools.cache
def extension_module() -> Any:
    """The C++ extension as a Python module, for helpers on the host; None if there is none for this Python."""
    if not _INFO.extension:
        return None
    try:
        return importlib.import_module("harmonica_kernels._C")
    except ImportError:  # built for another Python, which matters here though not for its operators
        return None


def same_abi(built: str, running: str) -> bool:
    """True if two versions of torch share their C++ ABI: same major.minor, whatever the patch or device."""
    return built.split(".")[:2] == running.split(".")[:2]


def rebuild_command(source: str | None) -> str:
    """The shell command that builds harmonica-rt for this interpreter and its torch.

    Args:
        source: the folder that it was built from, as the build recorded it; it may no longer exist.
    """
    command = [sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps", "--no-cache-dir"]
    if _setuptools() >= _SETUPTOOLS:  # otherwise pip fetches it and builds in isolation
        command.append("--no-build-isolation")
    tree = _FOLDER.parent.parent
    if _is_source(tree):
        command += ["--editable", str(tree)]
    elif source is not None and _is_source(Path(source)):
        command.append(source)
    else:
        command.append(f"git+{_REPOSITORY}")
    return shlex.join(command)


def _is_source(folder: Path) -> bool:
    return (folder / "setup.py").is_file() and (folder / "kernels" / _FOLDER.name / Path(__file__).name).is_file()


def _setuptools() -> int:
    try:
        return int(metadata.version("setuptools").partition(".")[0])
    except metadata.PackageNotFoundError:
        return 0


def _load() -> BuildInfo:
    record_file = _FOLDER / "_C.build.json"
    record: dict[str, str | None] = json.loads(record_file.read_text()) if record_file.exists() else {}
    built, compiler = record.get("torch"), record.get("compiler")
    running = str(torch.__version__)

    rebuild = f"build it again with `{rebuild_command(record.get('source'))}`"
    reason: str | None = None
    chosen = False
    if not record:
        reason = f"harmonica_kernels was never built: {rebuild}"
    elif built is None:
        chosen = record.get("chosen") == "yes"
        reason = record.get("reason") or "the build left no reason"
        reason = reason if chosen else f"{reason}: {rebuild}"
    elif not same_abi(built, running):
        reason = f"it was built against torch {built}, but this is torch {running}: {rebuild}"
        _warn_unusable(reason)
    else:
        library = _FOLDER / str(record["library"])
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            reason = f"{library.name}, built against torch {built}, does not load here: {error}: {rebuild}"
            _warn_unusable(reason)
    return BuildInfo(
        extension=reason is None,
        reason=reason,
        chosen=chosen,
        compiler=compiler,
        torch_built=built,
        torch_running=running,
        cpu_capability=str(torch.backends.cpu.get_cpu_capability()),
    )


def _warn_unusable(reason: str) -> None:
    warnings.warn(
        f"the C++ extension of harmonica_kernels is not used: {reason}. CPU ops run as eager PyTorch.",
        RuntimeWarning,
        stacklevel=3,
    )


_INFO: Final = _load()
