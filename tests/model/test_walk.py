"""What a forward reads in roundabout ways: a change of it makes another state of the model."""

from __future__ import annotations

import array
import collections
import contextvars
import enum
import functools
import itertools
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import FallbackWarning, Schedule
from harmonica_rt.model.facts import Facts
from harmonica_rt.model.watch import ModelWatch
from tests.model import settings
from tests.model.settings import image
from tests.models import SITES, stack, stack_call

GAIN = 1.0  # of the name of an attribute below as well
scale = 1.0
STRENGTH = contextvars.ContextVar("strength", default=1.0)
OF_THREAD = threading.local()


class ListOf(list[float]):
    unit = 1.0


class DictOf(dict[str, float]):
    unit = 1.0


class SetOf(set[str]):
    unit = 1.0


class Named(collections.namedtuple("Named", "scale")):
    unit = 1.0


class Mode(enum.Enum):
    SOFT = 1


class Amount:
    def __init__(self) -> None:
        self.by = 1.0

    def __mul__(self, other: float) -> float:
        return self.by * other

    def __float__(self) -> float:
        return self.by * GAIN


class Meta(type):
    unit = 1.0


class WithMeta(metaclass=Meta):
    pass


class Slots:
    __slots__ = ("__by",)

    def __init__(self) -> None:
        self.__by = 1.0

    def set(self, by: float) -> None:
        self.__by = by

    def get(self) -> float:
        return self.__by


class Controller:
    def __init__(self) -> None:
        self.by = 1.0


def helper(x: torch.Tensor) -> torch.Tensor:
    return x * getattr(helper, "by", 1.0)


def scaled(x: torch.Tensor) -> torch.Tensor:
    from tests.model.settings.image import SCALE

    return x * SCALE


def shifted(x: torch.Tensor) -> torch.Tensor:
    return x + settings.image.SHIFT * image.SCALE


class Reading(nn.Module):
    """Reads all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack(depth=1)
        self.kind = "first"
        self.amount, self.slots, self.controller = Amount(), Slots(), Controller()
        self.items, self.table, self.names, self.named = ListOf([1.0]), DictOf(a=1.0), SetOf("a"), Named(1.0)
        self.defaults: Any = collections.defaultdict(float)
        self.numbers, self.bytes, self.objects = array.array("d", [1.0]), bytearray(b"1"), np.array([1.0], dtype=object)
        self.held, self.proxy = weakref.ref(self.controller), weakref.proxy(self.controller)
        self.get = {"by": 1.0}.get
        self.tensor = torch.ones(1)
        self.mode = Mode.SOFT
        self.many = [1.0] * 20_000

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return x * GAIN

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """See `Stack`."""
        x = shifted(scaled(helper(getattr(self, self.kind)(latents))))
        x = x * (self.amount * 1.0) * float(self.amount) * self.slots.get() * self.held().by * self.proxy.by
        x = x * self.items[0] * self.items.unit * self.table["a"] * self.table.unit * len(self.names) * self.names.unit
        x = x * self.named.scale * self.named.unit * (1 + self.defaults["none"]) * self.numbers[0] * self.bytes[0]
        x = x * self.objects[0] * self.get("by") * getattr(self.tensor, "by", 1.0) * self.tensor * WithMeta.unit
        x = x * STRENGTH.get() * getattr(OF_THREAD, "by", 1.0) * getattr(self.mode, "by", 1.0) * self.many[9]
        return self.inner(x * getattr(self.items, "late", 1.0), timestep)


Change = Callable[[Reading, pytest.MonkeyPatch], object]


def setting(owner: Any, name: str, value: Any = 2.0) -> Change:
    return lambda m, patch: patch.setattr(
        owner(m) if isinstance(owner, types.LambdaType) else owner, name, value, raising=False
    )


def item(owner: Callable[[Reading], Any], key: Any, value: Any = 2.0) -> Change:
    def change(m: Reading, patch: pytest.MonkeyPatch) -> None:
        owner(m)[key] = value

    return change


CHANGES: dict[str, Change] = {
    "import in a function": setting(image, "SCALE"),
    "two names of one submodule": setting(image, "SHIFT"),
    "method that an attribute names": setting(lambda m: m, "kind", "scaled_inner"),
    "global of such a method": lambda m, patch: patch.setitem(globals(), "GAIN", 3.0),
    "operator": setting(lambda m: m.amount, "by"),
    "class of a list": setting(ListOf, "unit"),
    "class of a dict": setting(DictOf, "unit"),
    "class of a set": setting(SetOf, "unit"),
    "class of a named tuple": setting(Named, "unit"),
    "items of a set of a class": lambda m, _: m.names.add("b"),
    "attribute of a list, which comes later": setting(lambda m: m.items, "late"),
    "attribute of a function, which comes later": setting(lambda m: helper, "by"),
    "attribute of a tensor, which comes later": setting(lambda m: m.tensor, "by"),
    "attribute of a member of an enumeration": setting(Mode.SOFT, "by"),
    "default of a dict": setting(lambda m: m.defaults, "default_factory", int),
    "array": item(lambda m: m.numbers, 0),
    "bytes": item(lambda m: m.bytes, 0, 50),
    "array of objects": item(lambda m: m.objects, 0),
    "weak reference": setting(lambda m: m.controller, "by"),
    "bound method of a dict": item(lambda m: m.get.__self__, "by"),
    "private slot": lambda m, _: m.slots.set(2.0),
    "metaclass": setting(Meta, "unit"),
    "context variable": lambda m, _: STRENGTH.set(2.0),
    "of a thread": setting(OF_THREAD, "by"),
    "an item of many": item(lambda m: m.many, 9),
}


@pytest.fixture
def model() -> Iterator[Reading]:
    token = STRENGTH.set(1.0)
    yield Reading().eval()
    STRENGTH.reset(token)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_another_state(kind: str, model: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = ModelWatch(model)
    before = watch.look()
    assert watch.look() is before
    CHANGES[kind](model, monkeypatch)
    assert watch.look() is not before
    assert watch.look().facts is not before.facts


class WithoutAttributes:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not known")


ODD: dict[str, Any] = {
    "generic alias of a builtin": list[int],
    "generic alias with brackets of its own": collections.abc.Generator[None, object, object],
    "generic alias of typing": Any | None,
    "view of a dict": types.MappingProxyType({"a": 1}),
    "refuses attributes": WithoutAttributes(),
    "frame": sys._getframe(),
    "sparse": torch.eye(8).to_sparse(),
    "of oneDNN": torch.eye(8).to_mkldnn(),
    "on no device": torch.eye(8, device="meta"),
    "conjugate": torch.eye(8, dtype=torch.complex64).conj(),
}


class Odd(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.inner = stack(depth=1)
        self.held = held

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """See `Stack`."""
        if self.held is None:
            latents = latents * 2
        return self.inner(latents, timestep)


@pytest.mark.parametrize("kind", ODD)
def test_what_cannot_be_opened_is_told_by_identity(kind: str) -> None:
    model = Odd(ODD[kind]).eval()
    watch = ModelWatch(model)
    before = watch.look()
    facts = Facts(model)
    facts.put_back()
    assert facts.changes(model) == ()
    assert watch.look() is before
    compiled = hrt.compile(model, Schedule.every(2, steps=2, sites=["inner.blocks.0"]), lowering="plain", strict=True)
    with torch.no_grad():
        assert torch.equal(compiled(**stack_call(0)), model(**stack_call(0)))
    model.held = None
    assert watch.look() is not before


def test_the_state_comes_back(model: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = ModelWatch(model)
    before = watch.look()
    with monkeypatch.context() as patch:
        patch.setattr(image, "SCALE", 2.0)
        assert watch.look() is not before
    assert watch.look() is before


@pytest.mark.parametrize("name", ["scale", "latents", "inner", "items", "many", "print"])
def test_a_global_of_the_name_of_an_attribute_is_not_read(
    name: str, model: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, where results and compiled models stand under such names."""
    monkeypatch.setitem(globals(), name, hrt.compile(stack(), Schedule.every(2, steps=2, sites=SITES_OF_STACK)))
    watch = ModelWatch(model)
    before = watch.look()
    monkeypatch.setitem(globals(), name, 2.0)
    assert watch.look().facts is before.facts


SITES_OF_STACK = hrt.find_sites(stack(), patterns=SITES)


class Drawing(nn.Module):
    """Its forward goes on from where it was: with random numbers, or with an iterator."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = stack(depth=1), kind
        self.state: Any = {
            "generator of numpy": np.random.default_rng(0),
            "generator of Python": random.Random(0),
            "count": itertools.count(1),
            "cycle": itertools.cycle([1.0, 2.0]),
            "iterator": iter([1.0] * 99),
            "generator": (float(i) for i in range(99)),
            "array": np.ones(1),
        }.get(kind)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """See `Stack`."""
        if self.kind == "Python":
            by = random.random()
        elif self.kind == "numpy":
            by = float(np.random.rand())
        elif self.kind == "array":
            self.state[0] += 1
            by = float(self.state[0])
        else:
            by = self.state.random() if hasattr(self.state, "random") else next(self.state)
        return self.inner(latents * by, timestep)


@pytest.mark.parametrize(
    "kind",
    [
        "Python",
        "numpy",
        "generator of numpy",
        "generator of Python",
        "count",
        "cycle",
        "iterator",
        "generator",
        "array",
    ],
)
def test_a_forward_that_goes_on_from_where_it_was_has_no_plan(kind: str) -> None:
    model = Drawing(kind).eval()
    sites = hrt.find_sites(model, patterns=[f"inner.{site}" for site in SITES])
    random.seed(0)
    np.random.seed(0)
    drawn = random.getstate()
    compiled = hrt.compile(model, Schedule.every(2, steps=2, sites=sites))
    with pytest.warns(FallbackWarning, match="carries state from one call to the next"):
        compiled(**stack_call(0))
    if kind not in ("Python", "numpy"):
        assert random.getstate() == drawn


@functools.cache
def memo(size: int) -> torch.Tensor:
    return torch.full((size,), 2.0)


class Memoised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = stack(depth=1)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """See `Stack`."""
        return self.inner(latents * memo(latents.shape[-1]), timestep)


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_of_a_function_holds_no_traced_tensor_and_what_it_held(filled: bool) -> None:
    memo.cache_clear()
    model = Memoised().eval()
    held = memo(8) if filled else None
    compiled = hrt.compile(
        model, Schedule.every(2, steps=2, sites=hrt.find_sites(model, patterns=["inner.blocks.*.*"]))
    )
    compiled(**stack_call(0))
    assert type(memo(8)) is torch.Tensor
    assert torch.equal(memo(8), torch.full((8,), 2.0))
    if filled:
        assert memo(8) is held
