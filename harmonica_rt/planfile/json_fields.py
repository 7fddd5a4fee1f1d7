"""Typed access to the JSON values of a plan file.

A file may hold anything that JSON can hold in any place. Each function here takes a value and the place where it
stands, returns the value if it is what belongs there, and raises a PlanFileError that names the place if it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harmonica_rt.errors import PlanFileError
from harmonica_rt.untrusted.text import quoted

LARGEST_INTEGER = 2**63 - 1  # what torch takes


def refused(place: str, expected: str, value: Any) -> PlanFileError:
    """The error for a value that does not belong where it stands."""
    return PlanFileError(f"{place}: expected {expected}, got {quoted(value)}")


def fields_of(value: Any, place: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """An object that has all required fields and no unknown ones."""
    if not isinstance(value, dict):
        raise refused(place, f"an object with {', '.join(required)}", value)
    missing = [name for name in required if name not in value]
    unknown = [name for name in value if name not in required and name not in optional]
    if missing or unknown:
        raise refused(place, f"the fields {', '.join(required)}", sorted(value))
    return value


def items_of(value: Any, place: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise refused(place, "a list", value)
    return value


def text_of(value: Any, place: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise refused(place, "a string", value)
    return value


def integer_of(value: Any, place: str, least: int = 0, most: int = LARGEST_INTEGER) -> int:
    """A whole number between `least` and `most`."""
    if type(value) is not int or not least <= value <= most:
        raise refused(place, f"a whole number from {least} to {most}", value)
    return value


def integers_of(value: Any, place: str, least: int = 0, most: int = LARGEST_INTEGER) -> tuple[int, ...]:
    """A list of whole numbers between `least` and `most`."""
    return tuple(integer_of(item, f"{place}[{i}]", least, most) for i, item in enumerate(items_of(value, place)))
