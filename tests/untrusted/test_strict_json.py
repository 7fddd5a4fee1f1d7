"""JSON as its grammar has it: what Python's reader lets pass or fails on is one kind of error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.untrusted.strict_json import MAX_DEPTH, JsonError, parse, parse_object

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_what_json_can_say_is_read(value: object) -> None:
    assert parse(json.dumps(value)) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value


REFUSED = {
    "nan": ("[NaN]", "NaN is not JSON; numbers must be finite"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not JSON"),
    "overflow": ('{"a": [1, {"b": 1e999}]}', "b: expected a finite number, got inf"),
    "overflow-alone": ("-1e999", "the value: expected a finite number, got -inf"),
    "digits": ("9" * 401, "a number of 401 digits"),
    "more-digits-than-python-reads": ("-" + "9" * 5000, "a number of 5001 digits"),
    "twice": ('{"a": 1, "b": 1, "a": 2}', "a: the field occurs more than once"),
    "twice-inside": ('[{"\\u001b": 1, "\\u001b": 1}]', "\\x1b: the field occurs more than once"),
    "twice-by-escape": ('{"a": 1, "\\u0061": 2}', "a: the field occurs more than once"),
    "deep-lists": ("[" * 101 + "]" * 101, "JSON nested too deep, more than 100"),
    "deep-objects": ('{"a":' * 101 + "1" + "}" * 101, "JSON nested too deep, more than 100"),
    "deeper-than-python-reads": ("[" * 200_000, "JSON nested too deep"),
    "half-a-pair": ('"\\ud800"', "half of a surrogate pair, '\\ud800'"),
    "half-a-pair-as-key": ('{"\\uDC00": 1}', "half of a surrogate pair"),
    "not-utf8": (b'"\xff"', "not UTF-8 text"),
    "encoded-half": (b'"\xed\xa0\x80"', "not UTF-8 text"),
    "nul": (b'"a\x00b"', "not JSON, Invalid control character"),
    "bom": (b"\xef\xbb\xbf{}", "not JSON"),
    "utf16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
    "empty": ("", "not JSON, Expecting value at line 1, column 1"),
    "two-values": ("{}{}", "not JSON, Extra data"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_strict_json_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_thousand_different_keys_and_one_twice_are_told_fast() -> None:
    text = "{" + ", ".join(f'"{key}": 1' for key in [*range(200_000), 199_999]) + "}"
    with pytest.raises(JsonError, match="199999: the field occurs more than once"):
        parse(text)


def test_json_nested_up_to_the_limit_is_read() -> None:
    assert json.dumps(parse("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH)).count("[") == MAX_DEPTH
    assert parse('"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[]", "a list"),
        ('"a"', "a string"),
        ("true", "a boolean"),
        ("1", "a number"),
        ("1.5", "a number"),
        ("null", "null"),
    ],
)
def test_other_values_are_no_objects(text: str, kind: str) -> None:
    with pytest.raises(JsonError, match=f"expected a JSON object, got {kind}"):
        parse_object(text)
