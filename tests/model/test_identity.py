"""What containers hold, compared by identity: the extension and the Python that stands in for it, case by case."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import CellType, SimpleNamespace
from typing import Any

import pytest
import torch

import harmonica_kernels
from harmonica_rt.model import identity
from harmonica_rt.model.identity import contents

Compare = Callable[[list[Any], list[Any]], int]


def extension() -> Compare:
    if identity.first_change is identity._first_change:
        pytest.skip("needs the C++ extension")
    return identity.first_change


@pytest.fixture(params=["extension", "python"])
def first_change(request: pytest.FixtureRequest) -> Compare:
    """Either of the two."""
    return extension() if request.param == "extension" else identity._first_change


def test_the_sanitized_build_is_the_one_that_runs() -> None:
    folder = os.environ.get("HARMONICA_SANITIZED")
    if folder is None:
        pytest.skip("not under make sanitize")
    assert harmonica_kernels.build_info().extension
    library = sys.modules["harmonica_kernels._C"].__file__
    assert str(library).startswith(folder)


class Plain:
    """Holds attributes."""

    shared = 1


class Other:
    """Another class of the same layout."""


class Slotted:
    __slots__ = ("a", "b")


class TupleOfItems:
    """Neither attributes nor a known kind: iterated over."""

    __slots__ = ("items",)

    def __init__(self, *items: object) -> None:
        self.items = items

    def __iter__(self) -> Iterator[object]:
        return iter(self.items)


class EqualToAll:
    """Compares equal to everything, and must not be asked."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("asked for equality")

    __hash__ = object.__hash__


def cell(value: object) -> CellType:
    return CellType(value)


def function() -> Callable[..., Any]:
    def made(a: object = EqualToAll(), *, b: object = EqualToAll()) -> None: ...

    return made


def with_attributes(**attributes: object) -> Plain:
    made = Plain()
    made.__dict__.update(attributes)
    return made


def slotted() -> Slotted:
    made = Slotted()
    made.a = EqualToAll()
    return made


def class_with(**attributes: object) -> type:
    return type("Made", (Plain,), attributes)


A, B = EqualToAll(), EqualToAll()


def set_default(function: Any) -> None:
    function.__kwdefaults__ = {"b": B}


# each: how it is made, and the ways to change what it holds
KINDS: dict[str, tuple[Callable[[], Any], list[Callable[[Any], object]]]] = {
    "dict": (
        lambda: {"a": A, "b": 1},
        [
            lambda held: held.update(a=B),
            lambda held: held.pop("b"),
            lambda held: held.update(c=2),
            lambda held: held.update(a=held.pop("a")),  # another order
            dict.clear,
        ],
    ),
    "empty dict": (dict, [lambda held: held.update(a=None)]),
    "OrderedDict": (
        lambda: collections.OrderedDict(a=A, b=B),
        [lambda held: held.update(b=A), lambda held: held.popitem()],
    ),
    "defaultdict": (lambda: collections.defaultdict(list, a=A), [lambda held: held["b"]]),
    "list": (lambda: [A, B], [list.reverse, list.clear, lambda held: held.append(A), lambda held: held.pop()]),
    "empty list": (list, [lambda held: held.append(None)]),
    "entry of a dict": (
        lambda: ({"a": A, "b": B}, "a"),
        [lambda pair: pair[0].update(a=B), lambda pair: pair[0].pop("a")],
    ),
    "no entry of a dict": (lambda: ({"b": B}, "a"), [lambda pair: pair[0].update(a=B)]),
    "attribute": (lambda: (slotted(), "a"), [lambda pair: setattr(*pair, B), lambda pair: delattr(*pair)]),
    "no attribute": (lambda: (slotted(), "b"), [lambda pair: setattr(*pair, B)]),
    "cell": (lambda: cell(A), [lambda held: setattr(held, "cell_contents", B)]),
    "empty cell": (CellType, [lambda held: setattr(held, "cell_contents", B)]),
    "function": (
        function,
        [
            lambda held: setattr(held, "__code__", test_the_sanitized_build_is_the_one_that_runs.__code__),
            lambda held: setattr(held, "__defaults__", (B,)),
            lambda held: setattr(held, "__defaults__", None),
            set_default,
        ],
    ),
    "class": (
        lambda: class_with(a=A),
        [
            lambda held: setattr(held, "a", B),
            lambda held: setattr(held, "b", B),
            lambda held: delattr(held, "a"),
            lambda held: setattr(held, "__bases__", (Other,)),
        ],
    ),
    "object": (
        lambda: with_attributes(a=A),
        [
            lambda held: setattr(held, "a", B),
            lambda held: setattr(held, "b", B),
            lambda held: delattr(held, "a"),
            lambda held: setattr(held, "__class__", class_with()),
            lambda held: setattr(held, "__dict__", {"a": B}),
        ],
    ),
    "object without attributes": (Plain, [lambda held: setattr(held, "a", None)]),
    "module": (
        lambda: torch.nn.Linear(1, 1),
        [lambda held: held.train(False), lambda held: setattr(held, "a", A)],
    ),
    "set": (lambda: {1, "a", A}, [lambda held: held.add(B), lambda held: held.remove(A), set.clear]),
    "deque": (lambda: collections.deque([A, B]), [lambda held: held.rotate(), lambda held: held.pop()]),
    "iterable": (lambda: TupleOfItems(A, B), [lambda held: setattr(held, "items", (A,))]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_change_of_every_kind_is_seen(kind: str, first_change: Compare) -> None:
    make, changes = KINDS[kind]
    for change in changes:
        container = make()
        containers = [[], container, {}]
        noted = list(map(contents, containers))
        assert first_change(containers, noted) == -1
        change(container)
        assert first_change(containers, noted) == 1
        noted[1] = contents(container)
        assert first_change(containers, noted) == -1


@pytest.mark.parametrize("builtin", [int, dict, object, type, Exception])
def test_classes_of_python_itself(builtin: type, first_change: Compare) -> None:
    assert first_change([builtin], [contents(builtin)]) == -1
    assert first_change([builtin], [contents(Plain)]) == 0


def test_contents_are_told_apart_by_length(first_change: Compare) -> None:
    for container in ([A, B], {"a": A}, with_attributes(a=A), {A, B}, class_with(a=A), cell(A), function()):
        whole = contents(container)
        assert first_change([container], [whole[:-1]]) == 0
        assert first_change([container], [(*whole, A)]) == 0
        assert first_change([container], [()]) == 0


def test_equal_objects_are_no_identical_ones(first_change: Compare) -> None:
    number = 10**9
    container = {"a": number, "b": float(number)}
    noted = [contents(container)]
    container["a"] = int(str(number))
    assert container["a"] == number
    assert first_change([container], noted) == 0


@pytest.mark.parametrize(
    "given",
    [
        ((), []),
        ([], ()),
        ([[]], []),
        ([], [()]),
        ([[]], [[]]),
        ([(1, 2, 3)], [(None,)]),
        ([()], [()]),
        ([],),
        (),
    ],
)
def test_the_extension_refuses_what_it_cannot_take(given: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        extension()(*given)


class Raises:
    """Raises an error where it is looked at."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error

    def __iter__(self) -> Iterator[object]:
        yield A
        raise self.error


class NamedOddly(str):
    """A key that raises where it is compared."""

    def __eq__(self, other: object) -> bool:
        raise LookupError("compared")

    __hash__ = str.__hash__


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_errors_are_passed_on(error: type[BaseException], first_change: Compare) -> None:
    with pytest.raises(error):
        first_change([(Raises(error("no")), "a")], [(None,)])
    with pytest.raises(error):
        first_change([Raises(error("no"))], [(A, B)])


def test_an_attribute_that_is_missing_is_none(first_change: Compare) -> None:
    assert first_change([(Raises(AttributeError("no")), "a")], [(None,)]) == -1
    assert first_change([(Raises(AttributeError("no")), "a")], [(A,)]) == 0


def test_keys_that_raise(first_change: Compare) -> None:
    held = {NamedOddly("a"): A}
    assert first_change([held], [contents(held)]) == -1
    with pytest.raises(LookupError):
        first_change([(held, "a")], [(A,)])


class Meddler:
    """Runs some code whenever it is looked at: as an owner, as an iterable, or when it is freed."""

    __slots__ = ("__weakref__", "act")

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __getattr__(self, name: str) -> Any:
        self.act()
        return object()

    def __iter__(self) -> Iterator[object]:
        for _ in range(20):
            self.act()
            yield A


@pytest.mark.parametrize("seed", range(20))
def test_containers_that_change_while_they_are_compared(seed: int, first_change: Compare) -> None:
    """Attributes and iterators that clear, grow and replace what is compared, the two lists included: no crash."""
    chance = random.Random(seed)

    def act() -> None:
        for held in chance.sample([*dicts, *lists, containers, noted], 3):
            if chance.random() < 0.3:
                held.clear()
            elif isinstance(held, dict):
                held.update({str(chance.random()): [object()] for _ in range(50)})
            else:
                held += [[object()] for _ in range(50)]
        if chance.random() < 0.3:
            noted[:] = [tuple(object() for _ in range(10)) for _ in containers]

    dicts: list[dict[str, object]] = [{str(i): object() for i in range(10)} for _ in range(4)]
    lists: list[list[object]] = [[object() for _ in range(10)] for _ in range(4)]
    containers: list[Any] = []
    noted: list[Any] = []
    for _ in range(30):
        containers[:] = [*dicts, *lists, *(with_attributes(a=object()) for _ in range(4))]
        containers += [(Meddler(act), "a"), Meddler(act), (dicts[0], "1"), (Meddler(act), "b"), TupleOfItems(A, B)]
        known = (tuple, Meddler)  # those that act when they are looked at
        noted[:] = [(A,) * 20 if type(one) in known else contents(one) for one in containers]
        order = chance.sample(range(len(containers)), len(containers))
        containers[:], noted[:] = [containers[i] for i in order], [noted[i] for i in order]
        # contents that are none, lists that are no longer of one length, sets that changed: refused
        with contextlib.suppress(TypeError, RuntimeError, ValueError):
            assert -1 <= first_change(containers, noted) < 200


class Clears:
    """A key that empties its dict where it is compared."""

    def __init__(self, held: dict[Any, Any]) -> None:
        self.held = held

    def __hash__(self) -> int:
        return hash("a")

    def __eq__(self, other: object) -> bool:
        self.held.clear()
        return False


def test_a_dict_that_shrinks_while_it_is_asked(first_change: Compare) -> None:
    held: dict[Any, Any] = {}
    held[Clears(held)] = object()
    held.update({str(i): object() for i in range(100)})
    assert first_change([(held, "a"), held], [(None,), ()]) == -1


def test_containers_that_another_thread_changes(first_change: Compare) -> None:
    held: dict[str, object] = {str(i): object() for i in range(50)}
    items: list[object] = [object() for _ in range(50)]
    owner = with_attributes(**held)
    containers = [held, items, owner, (held, "1"), (owner, "1")]
    noted = list(map(contents, containers))
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            held.clear()
            items.clear()
            owner.__dict__ = {}
            held.update({str(i): [object()] for i in range(50)})
            items.extend([object()] for _ in range(50))
            owner.__dict__ = {str(i): [object()] for i in range(50)}

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            with contextlib.suppress(RuntimeError):  # "changed size during iteration": Python's own refusal
                assert -1 <= first_change(containers, noted) < len(containers)
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("seed", range(50))
def test_both_say_the_same(seed: int) -> None:
    compare, chance = extension(), random.Random(seed)
    makers = [make for make, _ in KINDS.values()]
    containers = [chance.choice(makers)() for _ in range(20)]
    noted = list(map(contents, containers))
    for kind in chance.sample(sorted(KINDS), 3):
        make, changes = KINDS[kind]
        container = make()
        place = chance.randrange(20)
        containers[place], noted[place] = container, contents(container)
        if chance.random() < 0.5:
            chance.choice(changes)(container)
    assert compare(containers, noted) == identity._first_change(containers, noted)


def test_nothing_is_leaked_or_freed_twice(first_change: Compare) -> None:
    thing = object()
    containers = [{"a": thing}, [thing], (with_attributes(a=thing), "a"), TupleOfItems(thing), with_attributes(a=thing)]
    noted = list(map(contents, containers))
    before = sys.getrefcount(thing), *(sys.getrefcount(one) for one in (*containers, *noted))
    for _ in range(100):
        assert first_change(containers, noted) == -1
        assert first_change(containers, [*noted[:-1], ()]) == 4
    assert before == (sys.getrefcount(thing), *(sys.getrefcount(one) for one in (*containers, *noted)))


def test_a_finalizer_that_runs_in_between(first_change: Compare) -> None:
    """What an attribute yields is freed while the containers are compared, and takes them with it."""
    containers: list[Any] = []
    noted: list[Any] = []

    class Yielded:
        def __del__(self) -> None:
            containers.clear()
            noted.clear()

    owner = SimpleNamespace()
    owner_of = type("Owner", (), {"__slots__": (), "a": property(lambda self: Yielded())})()
    containers += [(owner_of, "a"), [object()], owner]
    noted += [(Yielded,), contents(containers[1]), contents(owner)]
    functools.partial(first_change, containers, noted)()
    assert not containers
