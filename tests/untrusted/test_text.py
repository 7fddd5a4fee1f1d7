"""Text that a terminal may be sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.errors import HarmonicaError, ScheduleError
from harmonica_rt.untrusted.text import one_line, printable, quoted

characters = st.text(st.characters())  # halves of surrogate pairs among them


@given(characters)
def test_what_does_not_print_is_escaped(text: str) -> None:
    assert printable(text).replace("\n", "").replace("\t", "").isprintable()
    assert one_line(text).isprintable()
    assert quoted(text).isprintable()
    assert len(one_line(text)) <= 120
    assert str(HarmonicaError(text)) == printable(text)
    printable(text).encode()


@given(st.text(st.characters(exclude_categories=["C", "Z"])))
def test_what_prints_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\x00b\x7f\x9b", "a\\x00b\\x7f\\x9b"),
        ("\u202egnp", "\\u202egnp"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
        ("\r", "\\r"),
        ("line\n\tline", "line\n\tline"),
        ("naïve 猫 [/b] $x$", "naïve 猫 [/b] $x$"),
    ],
)
def test_text_and_errors_are_escaped_alike(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert str(ScheduleError(text)) == shown


class Loud:
    def __repr__(self) -> str:
        raise AssertionError("the repr of a value is not ours to call")


def test_values_are_quoted_in_few_words() -> None:
    assert quoted(10**5000) == "<a whole number of 16610 bits>"
    assert quoted(-12) == "-12"
    assert quoted("a\nb") == "'a\\nb'"
    assert quoted(Loud()) == "<Loud>"
    assert quoted([1, None, True, 2.5, b"x"]) == "[1, None, True, 2.5, b'x']"
    shared: list[object] = ["x" * 1000]
    for _ in range(100):
        shared = [shared, shared]
    assert len(quoted(shared)) <= 120
    endless: list[object] = []
    endless.append(endless)
    assert len(quoted(endless)) <= 120
    assert len(quoted({"k" * 10_000: "v" * 10_000})) <= 120
