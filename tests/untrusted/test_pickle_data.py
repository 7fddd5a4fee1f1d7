"""Pickles as data: what Python would call is recorded, what it would import is refused, and nothing grows."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.untrusted.pickle_data import Call, ForbiddenNameError, PickleError, read

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@given(values)
def test_plain_values_are_read_as_pickle_reads_them(value: object) -> None:
    assert read(io.BytesIO(pickle.dumps(value, 2))) == value


@given(st.binary(max_size=200), st.sampled_from([{"a": [1, (2, 3)]}, [1.5, None], "text"]), st.integers(0, 40))
def test_damaged_pickles_end_in_one_kind_of_error(noise: bytes, value: object, at: int) -> None:
    data = pickle.dumps(value, 2)
    for damaged in (noise, data[:at], data[:at] + noise + data[at:]):
        with contextlib.suppress(PickleError):
            read(io.BytesIO(damaged))


def test_a_namespace_is_a_record_of_a_call() -> None:
    value = read(io.BytesIO(pickle.dumps(argparse.Namespace(lr=0.1), 2)))
    assert isinstance(value, Call)
    assert (value.function, value.state) == ("argparse.Namespace", {"lr": 0.1})
    assert read(io.BytesIO(pickle.dumps(collections.OrderedDict(a=1), 2))) == {"a": 1}
    a_set = read(io.BytesIO(pickle.dumps({3}, 2)))
    assert isinstance(a_set, Call)
    assert a_set.arguments == ([3],)


class Payload:
    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call


def test_what_is_no_data_is_refused_by_its_name(tmp_path: Path) -> None:
    names = {os.mkdir: f"{os.name}.mkdir", eval: "__builtin__.eval", getattr: "__builtin__.getattr"}
    for function, name in names.items():
        data = pickle.dumps([Payload(function, str(tmp_path / "made"))], 2)
        with pytest.raises(ForbiddenNameError) as caught:
            read(io.BytesIO(data))
        assert caught.value.name == name
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",  # memo entry 2**31 of an empty stack
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x05\x96" + (10**12).to_bytes(8, "little") + b".",  # a bytearray of 10**12
        b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"1.",  # a number of 2**31 bytes
        b"\x80\x02X" + (2**32 - 1).to_bytes(4, "little") + b"a.",
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x08" + (10**12).to_bytes(8, "little") + b"\x85R.",
    ],
    ids=["memo-alone", "memo", "bytearray", "number", "text", "call"],
)
def test_sizes_that_the_file_makes_up_cost_nothing(data: bytes) -> None:
    tracemalloc.start()
    with contextlib.suppress(PickleError):
        read(io.BytesIO(data))
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_keys_that_hash_slowly_are_refused() -> None:
    key: object = ()
    for _ in range(60):
        key = (key, key)
    with pytest.raises(PickleError, match="a dict with the key"):
        read(io.BytesIO(pickle.dumps(Unhashed([(key, 1)]), 2)))


class Unhashed:
    """Pickled as a dict of items that nobody hashed."""

    def __init__(self, items: list[tuple[object, object]]) -> None:
        self.items = items

    def __reduce__(self) -> tuple[Any, ...]:
        return collections.OrderedDict, (), None, None, iter(self.items)
