"""A few hundred damaged files for every reader; `python -m benchmarks fuzz` is the same for longer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fuzz.format import Format
from benchmarks.fuzz.formats import FORMATS
from benchmarks.fuzz.run import bytes_of, run

FILES = {name: 60 if name == "plan" else 400 for name in FORMATS}  # a plan takes fifty times as long as the others
MOST_MEMORY = 2**30  # by which the process may grow: the files are a few KB


@pytest.mark.parametrize(
    ("name", "files"),
    [
        *(pytest.param(name, files, id=name) for name, files in FILES.items()),
        pytest.param("plan", 400, id="more plans", marks=pytest.mark.exhaustive),
    ],
)
def test_every_file_is_read_or_refused_in_words(name: str, files: int, tmp_path: Path) -> None:
    outcome = run(FORMATS[name], range(files), seed=1, folder=tmp_path)
    assert not outcome.findings, "\n".join(f"file {found.number}: {found.why}" for found in outcome.findings[:5])
    assert outcome.files == files == outcome.accepted + outcome.refused
    assert outcome.refused > files / 10  # the damage is seen
    assert outcome.accepted > files / 10  # and does not only garble
    assert outcome.grown < MOST_MEMORY


def refusal(error: Exception) -> Format:
    """A format of empty JSON objects whose reader raises `error` for a file that is anything else."""

    def read(path: Path) -> object:
        if path.read_bytes() != b"{}":
            raise error
        return {}

    return Format("test", "test.json", (ValueError,), lambda rng: b"{}", lambda rng: b"[]", read)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (KeyError("steps"), "KeyError: 'steps'"),
        (ValueError("wrong"), "does not name the file"),
        (ValueError("{path}: \x1b[2J"), "would steer a terminal"),
        (ValueError("{path}" + "x" * 5000), "characters long"),
        (ValueError("{path}: not an object"), None),
    ],
    ids=["undocumented", "nameless", "unprintable", "endless", "documented"],
)
def test_what_is_no_refusal_in_words_is_found(error: Exception, why: str | None, tmp_path: Path) -> None:
    named = type(error)(str(error.args[0]).replace("{path}", str(tmp_path / "test.json")))
    outcome = run(refusal(named), range(2), seed=0, folder=tmp_path)
    assert [finding.number for finding in outcome.findings] == ([1] if why else [])
    assert all(why is not None and why in finding.why for finding in outcome.findings)


def test_a_valid_file_that_is_refused_is_found(tmp_path: Path) -> None:
    def read(path: Path) -> object:
        raise ValueError(f"{path}: no")

    format = Format("test", "test.json", (ValueError,), lambda rng: b"{}", lambda rng: b"[]", read)
    outcome = run(format, range(2), seed=0, folder=tmp_path)
    assert [(finding.number, finding.why[:25]) for finding in outcome.findings] == [(0, "a valid file was refused:")]


def test_what_was_read_and_is_unfit_is_found(tmp_path: Path) -> None:
    def check(result: object, path: Path) -> None:
        assert json.loads(path.read_bytes()) == {}

    format = Format("test", "test.json", (), lambda rng: b"{}", lambda rng: b"[]", lambda path: None, check)
    outcome = run(format, range(2), seed=0, folder=tmp_path)
    assert [(finding.number, "unfit" in finding.why) for finding in outcome.findings] == [(1, True)]


# The others are written by libraries that put addresses or entries in an order of their own into a file.
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("router", "checkpoint", "embeddings")])
def test_a_file_is_made_again_from_its_number(name: str) -> None:
    first, again = ([bytes_of(FORMATS[name], 3, number) for number in range(40)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 20
