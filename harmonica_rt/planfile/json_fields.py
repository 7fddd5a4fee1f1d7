"""Typed access to the JSON values of a plan file.

A file may hold any JSON value in any place. Each function here takes a value and its place in the file, returns the
value if it is valid there, and otherwise raises a PlanFileError that names the place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harmonica_rt.errors import PlanFileError
from harmonica_rt.untrusted.text import quoted

LARGEST_INTEGER = 2**63 - 1  # the largest that torch takes


def refused(where: str, expected: str, value: Any) -> PlanFileError:
    """The error for a value that is not valid in its place."""
    return PlanFileError(f"{where}: expected {expected}, got {quoted(value)}")


def fields_of(value: Any, where: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Check that a value is an object with all required fields and no unknown ones, and return it."""
    if not isinstance(value, dict):
        raise refused(where, f"an object with {', '.join(required)}", value)
    missing = [name for name in required if name not in value]
    unknown = [name for name in value if name not in required and name not in optional]
    if missing or unknown:
        raise refused(where, f"the fields {', '.join(required)}", sorted(value))
    return value


def items_of(value: Any, where: str) -> list[Any]:
    """Check that a value is a list, and return it."""
    if not isinstance(value, list):
        raise refused(where, "a list", value)
    return value


def text_of(value: Any, where: str) -> str:
    """Check that a value is a string, and return it."""
    if not isinstance(value, str):
        raise refused(where, "a string", value)
    return value


def integer_of(value: Any, where: str, least: int = 0, most: int = LARGEST_INTEGER) -> int:
    """Check that a value is an integer from `least` to `most`, both included, and return it."""
    if type(value) is not int or not least <= value <= most:
        raise refused(where, f"a whole number from {least} to {most}", value)
    return value


def integers_of(value: Any, where: str, least: int = 0, most: int = LARGEST_INTEGER) -> tuple[int, ...]:
    """Check that a value is a list of integers from `least` to `most`, both included, and return it as a tuple."""
    return tuple(integer_of(item, f"{where}[{i}]", least, most) for i, item in enumerate(items_of(value, where)))
