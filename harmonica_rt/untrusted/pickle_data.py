"""Reads pickles as data: nothing that they name is imported, and nothing that they call is called.

Hazard: a pickle is a program. Unpicklers that let only known functions run still allocate as much as the file tells
them to, and some trust sizes that the file makes up. This one builds dicts, lists, tuples and plain values, and keeps
every function call as a record of the call; what it makes is never larger than the file. It knows only the opcodes that
`torch.save` writes, and only the names in `_NAMES`.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from harmonica_rt.untrusted.text import quoted

# Plain containers, and what torch writes for tensors, their storages, dtypes and devices.
_NAMES = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace|(__builtin__|builtins)\.(set|complex|bytearray)|_codecs\.encode"
    r"|torch\.(_utils\._rebuild_\w+|_tensor\._rebuild_from_type_v2|\w+Storage|storage\.\w+Storage|Size|device|[a-z0-9_]+)"
    r"|torch\.(nn\.parameter\.Parameter|serialization\._get_layout)"
)


class PickleError(ValueError):
    """The bytes are not a pickle, or the pickle holds something that this reader does not know."""


class ForbiddenNameError(PickleError):
    """A pickle names a function or class that is not data; `name` is that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it asks for {name}")
        self.name = name


@dataclass(frozen=True, eq=False)
class Name:
    """A function or class that the pickle names, e.g. `torch.FloatStorage`."""

    name: str


@dataclass(eq=False)
class Call:
    """A call that the pickle asks for, not executed; `state` is what its result would be given afterwards.

    It has nothing to do with `call.Call`, the call of a denoiser.
    """

    function: str
    arguments: tuple[object, ...]
    state: object = None


@dataclass(frozen=True, eq=False)
class External:
    """A reference to something stored beside the pickle: a tensor's storage."""

    identity: object


def read(stream: BinaryIO) -> object:
    """The value of the pickle that begins here; leaves the stream positioned after it.

    Raises:
        ForbiddenNameError: the pickle names something other than Python containers and torch tensors.
        PickleError: it is damaged, or not of the kind that `torch.save` writes.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            handle = _HANDLERS.get(opcode.name)
            if handle is None:
                raise PickleError(f"it holds the opcode {opcode.name}, which torch.save does not write")
            handle(machine, argument)
        return machine.stack.pop()
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # raised by the decoder and the handlers if the opcodes make no sense: an empty stack, a missing mark
        raise PickleError(f"not a pickle ({type(error).__name__})") from error


class _Machine:
    """The stack, its marks and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def above_mark(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def top(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise PickleError("it takes more from the stack than is on it")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items


def _push(machine: _Machine, value: object) -> None:
    machine.stack.append(value)


def _constant(make: Callable[[], object]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make())


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(tuple(machine.top(count)))


def _mark(machine: _Machine, _: object) -> None:
    machine.marks.append(len(machine.stack))


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _get(machine: _Machine, index: int) -> None:
    machine.stack.append(machine.memo[index])


def _name(machine: _Machine, argument: str) -> None:
    name = argument.replace(" ", ".")
    if not _NAMES.fullmatch(name):
        raise ForbiddenNameError(name)
    machine.stack.append(Name(name))


def _call(machine: _Machine, _: object) -> None:
    function, arguments = machine.top(2)
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise PickleError("it calls something that is not a function")
    ordered = function.name == "collections.OrderedDict" and not arguments
    machine.stack.append({} if ordered else Call(function.name, arguments))


def _build(machine: _Machine, _: object) -> None:
    [state] = machine.top(1)
    if isinstance(machine.stack[-1], Call):
        machine.stack[-1].state = state
    elif not isinstance(machine.stack[-1], dict):  # attributes of an OrderedDict are not needed
        raise PickleError("it sets attributes of a plain value")


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        raise PickleError("it appends to something that is not a list")
    target.extend(items)


def _set(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
        raise PickleError("it sets a key of something that is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | None):  # others cannot be hashed, or not in bounded time
            raise PickleError(f"it holds a dict with the key {quoted(key)}")
        target[key] = value


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    **dict.fromkeys(("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"), _push),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _tuple_of(0),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.above_mark())),
    "MARK": _mark,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "GLOBAL": _name,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "BUILD": _build,
    "BINPERSID": lambda machine, _: machine.stack.append(External(machine.stack.pop())),
    "APPEND": lambda machine, _: _append(machine, machine.top(1)),
    "APPENDS": lambda machine, _: _append(machine, machine.above_mark()),
    "SETITEM": lambda machine, _: _set(machine, machine.top(2)),
    "SETITEMS": lambda machine, _: _set(machine, machine.above_mark()),
}
