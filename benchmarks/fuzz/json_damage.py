"""Damages JSON documents according to their structure: changes values, types and sizes, removes and doubles fields.

A JSON format needs only `damaged_json`; `changed` returns another document, for formats that contain one.
"""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

from benchmarks.fuzz.format import garbled

_RAW = "@raw@"  # placeholder for text that no value is serialised as

ODD_TEXT = (
    "", " ", "0", "a\x00b", "\x1b[2J\x1b]0;title\x07", "[/b]", "[bold red]x", "$\\frac{1}{0}$", "%s{0}{x!r}",
    "\u202egnp.exe", "\u0661\u0662", "a\nb", "\ud800", "../../etc/passwd", "__class__", "constructor", "None", "true",
    "x" * 70_000, "a." * 3000, "\U0001f600", "-0", "1e5",
)  # fmt: skip
ODD_NUMBERS = (
    0, 1, -1, 2, 3, 1000, 10**9, 2**31, 2**32 - 1, 2**63, -(2**63) - 1, 2**64, 10**399, -(10**399), 0.5, -0.0, 1e308,
    5e-324, 1e16,
)  # fmt: skip
ODD_TOKENS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 401, "9" * 4300, "-" + "9" * 4301, "9" * 100_000,
    "9" * 300 + ".5", "0." + "1" * 5000, "1e-99999", "01", "+1", ".5", "1.", "1_000", "0x10", "-",
    "[" * 99 + "]" * 99, "[" * 2000 + "]" * 2000, '{"a":' * 50_000 + "1" + "}" * 50_000, "[" * 100_000,
    "'a'", '"\\ud800"', '"\\udc00\\ud800"', '"\\x41"', '"a\x00b"', '"a\x01b"', '"\\u0000"',
    "undefined", "True", "None", "", ",", "}", "]", "/**/1", '{"":0}', '{"a":1,"a":1}',
)  # fmt: skip


def damaged_json(rng: Random, document: Any) -> bytes:
    """The text of a document that is changed in one or a few places; sometimes its bytes are changed too."""
    if rng.random() < 0.15:
        return garbled(rng, json.dumps(document, indent=rng.choice((None, 1))).encode())
    document = changed(rng, document, times=rng.choice((1, 1, 1, 2, 3, 8)))
    raw = rng.choice(ODD_TOKENS) if rng.random() < 0.25 else None
    if raw is not None:
        document = _replaced(rng, document, _RAW)
    twice = raw is None and rng.random() < 0.1
    if twice and isinstance(document, dict):
        holder = rng.choice([value for value in _containers(document) if isinstance(value, dict)])
        key = rng.choice([*holder, "a"])
        raw = f"{json.dumps(key)}: {json.dumps(holder.get(key))}, {json.dumps(key)}"
        holder[_RAW] = rng.choice((0, None, holder.get(key)))
    text = json.dumps(document, indent=rng.choice((None, None, 1)))
    data = text.replace(f'"{_RAW}"', raw if raw is not None else "0").encode("utf-8", "surrogatepass")
    return garbled(rng, data) if rng.random() < 0.1 else data


def changed(rng: Random, document: Any, times: int = 1) -> Any:
    """A copy of `document` with `times` changes of meaning, type, size or structure."""
    document = copy.deepcopy(document)
    for _ in range(times):
        document = _change(rng, document)
    return document


def odd_value(rng: Random) -> Any:
    """A value that no reader expects."""
    match rng.randrange(7):
        case 0:
            return rng.choice((None, True, False))
        case 1 | 2:
            return rng.choice(ODD_NUMBERS)
        case 3 | 4:
            return rng.choice(ODD_TEXT)
        case 5:
            return rng.choice(([], {}, [[]], [None], {"a": {}}, [[[[0]]]], {"": ""}, [0] * 1000, ["1"] * 3))
        case _:
            return {rng.choice(ODD_TEXT[:12]): rng.choice(ODD_NUMBERS)}


def _change(rng: Random, document: Any) -> Any:
    holder = rng.choice(_containers(document) or [[]])
    keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return _replaced(rng, document, odd_value(rng))
    key, other = rng.choice(keys), rng.choice(keys)
    match rng.randrange(9):
        case 0:
            del holder[key]
        case 1:
            holder[key], holder[other] = holder[other], holder[key]
        case 2:
            holder[key] = copy.deepcopy(holder[other])
        case 3 if isinstance(holder, dict):
            holder[rng.choice((*ODD_TEXT, str(key) + "s", str(key).upper()))] = holder.pop(key)
        case 3 | 4 if isinstance(holder, list):
            holder.insert(key, odd_value(rng) if rng.random() < 0.5 else copy.deepcopy(holder[other]))
        case 4 if isinstance(holder, dict):
            holder[rng.choice(ODD_TEXT)] = odd_value(rng)
        case 5:
            holder[key] = _near(rng, holder[key])
        case 6 if isinstance(holder, list):
            del holder[key:]
        case 7:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
        case _:
            holder[key] = odd_value(rng)
    return document


def _near(rng: Random, value: Any) -> Any:
    """A slightly different value, mostly of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return rng.choice(
                (value + 1, value - 1, -value, value * 2, float(value) if abs(value) < 2**53 else 0.0, str(value))
            )
        case str() if value:
            at = rng.randrange(len(value))
            return rng.choice(
                (value[:at], value + value, value[:at] + rng.choice("01aZ.\x00 [$é") + value[at + 1 :], value.upper())
            )
        case list():
            return value + value if rng.random() < 0.5 else value[::-1]
        case _:
            return odd_value(rng)


def _replaced(rng: Random, document: Any, value: Any) -> Any:
    """`document` with one of its values replaced; sometimes the whole document is replaced."""
    holders = _containers(document)
    if not holders or rng.random() < 0.05:
        return value
    holder = rng.choice(holders)
    if isinstance(holder, dict):
        holder[rng.choice([*holder, "a"])] = value
    elif holder:
        holder[rng.randrange(len(holder))] = value
    else:
        holder.append(value)
    return document


def _containers(document: Any) -> list[Any]:
    """Every list and object in a document, including itself."""
    found, rest = [], [document]
    while rest:
        value = rest.pop()
        if isinstance(value, dict | list):
            found.append(value)
            rest += value.values() if isinstance(value, dict) else value
    return found
