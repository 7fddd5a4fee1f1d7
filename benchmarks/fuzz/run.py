"""Reads files of a format, one after the other, and counts the results.

File `n` depends only on the format, the seed and `n`, so these three reproduce a finding.
"""

from __future__ import annotations

import resource
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.fuzz.format import Format

VALID_EVERY = 8  # every eighth file is valid and must be read


@dataclass(frozen=True)
class Finding:
    """A file that was neither read nor refused as documented.

    Attributes:
        number: number of the file.
        why: what happened, with the traceback if there is one.
        data: bytes of the file.
    """

    number: int
    why: str
    data: bytes


@dataclass
class Outcome:
    """What happened to the files of a format.

    Attributes:
        files: number of files.
        accepted: number of files that were read.
        refused: number of files that were refused with a documented error.
        findings: files with any other result.
        slowest: seconds of the slowest file.
        grown: growth of the process's peak memory, in bytes.
    """

    files: int = 0
    accepted: int = 0
    refused: int = 0
    findings: list[Finding] = field(default_factory=list)
    slowest: float = 0.0
    grown: int = 0


def bytes_of(format: Format, seed: int, number: int) -> bytes:
    """Bytes of file `number` of a format."""
    rng = Random(f"{format.name} {seed} {number}")
    return format.valid(rng) if number % VALID_EVERY == 0 else format.damaged(rng)


def run(format: Format, numbers: Iterable[int], seed: int, folder: Path, until: float | None = None) -> Outcome:
    """Read the numbered files until the time is up.

    Args:
        format: the format.
        numbers: numbers of the files.
        seed: seed of all random choices.
        folder: folder in which each file is written in turn.
        until: when to stop, in the time of `time.monotonic`; None for never.
    """
    outcome, before = Outcome(), _peak()
    path = folder / format.file
    for number in numbers:
        if until is not None and time.monotonic() > until:
            break
        data = bytes_of(format, seed, number)
        path.write_bytes(data)
        outcome.files += 1
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            why = _read(format, path, valid=number % VALID_EVERY == 0, outcome=outcome)
        outcome.slowest = max(outcome.slowest, time.perf_counter() - started)
        if why is not None:
            outcome.findings.append(Finding(number, why, data))
    outcome.grown = _peak() - before
    return outcome


def _read(format: Format, path: Path, *, valid: bool, outcome: Outcome) -> str | None:
    """Read a file and count the result; returns what is wrong, or None."""
    try:
        result = format.read(path)
    except format.errors as error:
        outcome.refused += 1
        if valid:
            return f"a valid file was refused: {error}"
        return _unfit(str(error), path)
    except Exception:  # the fuzzer looks for this: an undocumented error
        return traceback.format_exc()
    outcome.accepted += 1
    try:
        format.check(result, path)
    except Exception:  # likewise: any failure of a result that was read
        return f"read, but unfit for use: {traceback.format_exc()}"
    return None


def _unfit(message: str, path: Path) -> str | None:
    """What is wrong with an error message, or None."""
    if str(path) not in message:
        return f"the error does not name the file: {message[:500]}"
    if not all(c.isprintable() or c in "\n\t" for c in message):
        return f"the error would steer a terminal: {message[:500]!r}"
    if len(message) > 2000 + len(str(path)):
        return f"the error is {len(message)} characters long: {message[:500]}"
    return None


def _peak() -> int:
    """Peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
