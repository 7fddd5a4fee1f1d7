"""Strict JSON, for every file format of this project.

Hazard: Python's reader is lenient where a file must be strict. The last of two equal keys wins, NaN passes, half of a
surrogate pair becomes a string that cannot be written, and deep nesting or a long number raises one of Python's own
errors. Here each of these is a `JsonError`, and whatever is parsed from bytes can be written again.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import NoReturn

from harmonica_rt.untrusted.text import quoted

MAX_DIGITS = 400  # per integer: more than any float holds; Python itself refuses to read more than 4,300
MAX_DEPTH = 100  # nesting of lists and objects

_SURROGATE = re.compile(r"\\u[dD]")


class JsonError(ValueError):
    """The bytes are not strict JSON; the message says why, phrased to follow "the file is ...: "."""


def parse(data: bytes | str) -> object:
    """The value that the JSON text `data` holds.

    Raises:
        JsonError: the text is not UTF-8, not JSON, or nested more than `MAX_DEPTH` deep; an object has a duplicate key;
            a number is NaN, too large for a float, or has more than `MAX_DIGITS` digits; or a string holds half of a
            surrogate pair.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_int)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 text ({error})") from error
    except UnicodeEncodeError as error:
        raise JsonError(f"a string holds half of a surrogate pair, {error.object[error.start]!a}") from error
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON, {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise JsonError("JSON nested too deep") from error
    _check_values(value)
    return value


def parse_object(data: bytes | str) -> dict[str, object]:
    """The JSON object in `data`.

    Raises:
        JsonError: as for `parse`, or the value is not an object.
    """
    value = parse(data)
    if not isinstance(value, dict):
        raise JsonError(f"expected a JSON object, got {type_name(value)}")
    return value


def type_name(value: object) -> str:
    """JSON's name for the type of a value, with its article."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise JsonError(f"{quoted(twice)[1:-1]}: the field occurs more than once; keep one (a merge gone wrong?)")
    return value


def _constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not JSON; numbers must be finite")


def _int(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise JsonError(f"a number of {len(digits)} digits, more than {MAX_DIGITS}")
    return int(digits)


def _check_values(value: object) -> None:
    """Raise JsonError if lists and objects are nested too deep, or a number is too large for a float."""
    level: list[tuple[str, object]] = [("the value", value)]
    depth = 0
    while level:
        inner: list[tuple[str, object]] = []
        for name, whole in level:
            if isinstance(whole, float) and math.isinf(whole):
                raise JsonError(f"{quoted(name)[1:-1]}: expected a finite number, got {whole}")
            if not isinstance(whole, dict | list):
                continue
            if depth == MAX_DEPTH:
                raise JsonError(f"JSON nested too deep, more than {MAX_DEPTH} levels of lists and objects")
            inner += whole.items() if isinstance(whole, dict) else ((name, part) for part in whole)
        level, depth = inner, depth + 1
