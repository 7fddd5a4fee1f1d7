"""Walks over a model and notes everything that its forward can read. See `facts`.

The walk reaches the module tree with its plain attributes and all objects that these hold; the classes of all of them;
and, starting from `forward` and following the names in code, the methods, functions and module attributes in use.
Packages whose code is not the model's (torch, the standard library) are trusted to stay the same: their functions count
by identity, so that a replaced one is noticed, and are not followed.
"""

from __future__ import annotations

import builtins
import functools
import random
import sys
import threading
import weakref
from collections import defaultdict, deque
from types import BuiltinFunctionType, BuiltinMethodType, FunctionType, GenericAlias, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as every_module

from harmonica_rt.model.code_names import function_in, names_in, names_loaded
from harmonica_rt.model.forward import own_forward
from harmonica_rt.model.hidden_state import Hidden, hidden_state, is_untold
from harmonica_rt.model.identity import cell_contents, items_of
from harmonica_rt.model.tensors import metadata

LARGEST_CONTAINER = 10_000  # items; a larger container counts only by the identity of its items

SCALARS = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, range)
BY_TEXT = (float, complex)  # not by value: NaN is unequal to itself, and -0.0 equals 0.0
CLOSED = (sys.stdlib_module_names | {"torch", "numpy", "harmonica_rt", "harmonica_kernels"}) - {"__main__"}
# modules in CLOSED packages whose objects just hold attributes
_PLAIN_OBJECTS = frozenset({"types", "argparse", "collections", "dataclasses", "os", "queue", "weakref", "_thread"})

# Attributes of every module that a forward does not read, or that are handled separately.
UNREAD = frozenset((*nn.Module().__dict__, "_compiled_call_impl")) - {"training", "_parameters", "_buffers", "_modules"}
# Likewise of the model itself: what runs around a plan. Its innermost forward is handled separately.
UNREAD_OF_ROOT = UNREAD | {"forward", "_old_forward", "_hf_hook", "_diffusers_hook"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NOT_OF_A_CLASS = frozenset(
    (
        *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__hash__", "__slots__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__orig_bases__"),
        *("__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__", "__match_args__"),
        *("__dataclass_fields__", "__dataclass_params__", "__parameters__"),
        "__slotnames__",  # copying or pickling an object stores it in the class
    )
)
_CALLED_UNNAMED = ("forward",)  # besides the dunder methods that Python calls for its syntax, which are all but these:
_NOT_CALLED = frozenset(
    (
        *("__repr__", "__str__", "__format__", "__dir__", "__sizeof__", "__del__", "__init_subclass__", "__set_name__"),
        *("__class_getitem__", "__subclasshook__", "__prepare__", "__copy__", "__deepcopy__", "__reduce__"),
        *("__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__"),
    )
)


def own_attributes(module: nn.Module, *, root: bool) -> list[str]:
    """Names of a module's attributes besides parameters, buffers, children and hooks, and what runs around the root."""
    held_apart = {"_parameters", "_buffers", "_modules", "_hf_hook", "_diffusers_hook"}
    return sorted(module.__dict__.keys() - (UNREAD_OF_ROOT if root else UNREAD) - held_apart)


class Is:
    """Compares an object by identity, and keeps it alive, so that no other object gets its address."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Is) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


class Place(NamedTuple):
    """The place of a fact: the index of its parent fact (-1 for none), and its name under that."""

    parent: int
    name: str


class Walk:
    """One walk over a model, in a fixed order, so that equal models give equal lists."""

    def __init__(self, model: nn.Module) -> None:
        self.values: list[Any] = []
        self.places: list[Place] = []
        self.containers: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.hidden: list[tuple[Hidden, Any]] = []
        self.untold: list[str] = []
        self.caches: list[Any] = []
        self._root = model
        self._seen: dict[int, int] = {}  # id of an object -> index of its fact
        self._kept: list[Any] = []  # visited objects, kept alive so that their ids stay unique
        self._pending: list[tuple[int, str, Any]] = []
        self._entries: set[tuple[int, str]] = set()  # (id of a dict of globals, name) of the names watched
        self._reached: dict[str, None] = dict.fromkeys(_CALLED_UNNAMED)
        self._methods: dict[str, list[tuple[int, FunctionType]]] = {}
        self._tree = {id(module) for module in model.modules()}
        hooks = (every_module._global_forward_hooks, every_module._global_forward_pre_hooks)
        self.containers += hooks
        self._note(-1, "hooks of every module", tuple(Is(hook) for held in hooks for hook in held.values()))
        self._visit(-1, "", model)
        self._run()

    def _run(self) -> None:
        while self._pending:
            parent, name, value = self._pending.pop()
            self._visit(parent, name, value)

    def _note(self, parent: int, name: str, value: Any) -> int:
        self.values.append(value)
        self.places.append(Place(parent, name))
        return len(self.values) - 1

    def _visit(self, parent: int, name: str, value: Any) -> None:
        kind = type(value)
        if kind in SCALARS:
            self._note(parent, name, (kind, value))
            if kind is str and value.isidentifier():
                self._reach(value)  # getattr(self, self.kind)
        elif kind in BY_TEXT:
            self._note(parent, name, (kind, repr(value)))
        elif kind is not tuple and id(value) in self._seen:
            self._note(parent, name, ("the same as", self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self.values)
            self._kept.append(value)
            self._open(parent, name, value)

    def _open(self, parent: int, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            # A tensor has a single weak reference while it lives, which identifies it without keeping it alive.
            fact = self._note(parent, name, (Is(weakref.ref(value)), metadata(value)))
            self._later(fact, [(".__dict__", value.__dict__)])
        elif issubclass(type(value), nn.Module):  # isinstance() is fooled by proxies and compiled models
            self._module(parent, name, value)
        elif isinstance(value, type):
            self._class(parent, name, value)
        elif issubclass(type(value), (dict, list, tuple, set, frozenset, deque)):
            self._container(parent, name, value)
        elif isinstance(value, FunctionType):
            self._function(parent, name, value)
        elif isinstance(value, MethodType) and value.__self__ is SHARED_GENERATOR:
            self._note(parent, name, ("method", Is(value.__func__)))
        elif isinstance(value, MethodType):
            fact = self._note(parent, name, ("method",))
            self._later(fact, [(".__func__", value.__func__), (".__self__", value.__self__)])
        elif isinstance(value, functools.partial):
            fact = self._note(parent, name, ("partial",))
            self._later(fact, [(".func", value.func), (".args", value.args), (".keywords", value.keywords)])
        elif (hidden := hidden_state(value)) is not None:
            told = hidden.tell()
            self.hidden.append((hidden, told))
            self._note(parent, name, (Is(type(value)), told))
        elif is_untold(value):
            self.untold.append(f"{name.lstrip('.')} is a {type(value).__name__}, whose state nothing tells")
            self._note(parent, name, Is(value))
        elif isinstance(value, (weakref.ref, *weakref.ProxyTypes)):
            fact = self._note(parent, name, ("weakly",))
            self._later(fact, [("()", referent(value))])
        elif isinstance(value, BuiltinMethodType) and not isinstance(value.__self__, _NO_OWNERS):
            fact = self._note(parent, name, ("method", value.__name__))
            self._later(fact, [(".__self__", value.__self__)])
        elif _is_opened(value):
            self._object(parent, name, value)
        else:
            fact = self._note(parent, name, Is(value))
            if isinstance(value, functools._lru_cache_wrapper):
                self.caches.append(value)
                self._later(fact, [(".__wrapped__", value.__wrapped__)])

    def _later(self, parent: int, children: list[tuple[str, Any]]) -> None:
        self._pending += [(parent, name, value) for name, value in reversed(children)]

    # ---- containers and objects

    def _container(self, parent: int, name: str, value: Any) -> None:
        kind = type(value)
        items = items_of(value)
        if not isinstance(value, (tuple, frozenset)):
            self.containers.append(value)
        if len(items) > LARGEST_CONTAINER:
            fact = self._note(parent, name, (Is(value), tuple(map(Is, items))))
        elif isinstance(value, dict):
            fact = self._note(parent, name, (kind, tuple(map(_key, dict.keys(value)))))
            self._later(fact, [(f"[{key!r:.80}]", item) for key, item in dict.items(value)])
        elif isinstance(value, (set, frozenset)):
            fact = self._note(parent, name, (kind, frozenset(map(_key, items))))
        else:
            fact = self._note(parent, name, (kind, len(items)))
            self._later(fact, [(f"[{index}]", item) for index, item in enumerate(items)])
        if kind.__flags__ & _HEAP_TYPE or kind is defaultdict:  # a subclass, whose objects may have attributes
            self._seen_class(kind)
            self._later(fact, [(".__dict__", getattr(value, "__dict__", None))])
            if isinstance(value, defaultdict):
                self.hidden.append((Hidden(lambda: id(value.default_factory)), id(value.default_factory)))
                self._later(fact, [(".default_factory", value.default_factory)])

    def _object(self, parent: int, name: str, value: Any) -> None:
        self._seen_class(type(value))
        slots = [slot for slot in _slots(type(value)) if hasattr(value, slot)]
        attributes = {slot: getattr(value, slot) for slot in slots}
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):  # an object that poses as a class may have another mapping
            attributes |= own
            self.containers.append(own if isinstance(value, threading.local) else value)  # `own` is this thread's
        self.containers += [(value, slot) for slot in slots]
        # objects of classes written in C hold more than they show
        written_in_c = any(base is not object and not base.__flags__ & _HEAP_TYPE for base in type(value).__mro__)
        identity = Is(value) if written_in_c else None
        fact = self._note(parent, name, (Is(type(value)), tuple(sorted(attributes)), identity))
        self._later(fact, [(f".{key}", attributes[key]) for key in sorted(attributes)])

    def _module(self, parent: int, name: str, module: nn.Module) -> None:
        root, attributes = module is self._root, module.__dict__
        self._seen_class(type(module))
        self.containers.append(module)
        names = own_attributes(module, root=root)
        in_tree = id(module) in self._tree
        fact = self._note(parent, name, (Is(type(module)), tuple(names), _hooks(module) if not root else None))
        children: list[tuple[str, Any]] = []
        if root:
            own = own_forward(module)
            children.append((".forward", getattr(own, "__func__", own)))
        children += [(f".{key}", attributes[key]) for key in names]
        for held in ("_parameters", "_buffers"):
            tensors = attributes[held]
            if tensors:
                self.containers.append(tensors)
            for key, tensor in tensors.items():
                if in_tree:
                    self._weight(fact, f".{key}", tensor)
                else:
                    children.append((f".{key}", tensor))
        for key in _HOOKS:
            self.containers.append(attributes[key])
        if (registry := attributes.get("_diffusers_hook")) is not None:
            self.containers.append(registry.hooks)
        if modules := attributes["_modules"]:
            self.containers.append(modules)
            children += [(f".{key}", child) for key, child in modules.items()]
        self._later(fact, children)

    def _weight(self, parent: int, name: str, tensor: torch.Tensor | None) -> None:
        """Note a weight by its metadata alone: its values are read live, and a replaced weight is fetched anew."""
        if tensor is None:
            self._note(parent, name, (type(None), None))
        elif id(tensor) in self._seen:
            self._note(parent, name, ("the same as", self._seen[id(tensor)]))
        else:
            self._seen[id(tensor)] = self._note(parent, name, ("weight", metadata(tensor)))

    # ---- code

    def _seen_class(self, cls: type) -> None:
        """Note the class of an object. It is reached without a name, so it has no parent fact."""
        if id(cls) not in self._seen:
            self._visit(-1, _qualified(cls), cls)

    def _class(self, parent: int, name: str, cls: type) -> None:
        fact = self._note(parent, name, Is(cls))
        for base in (*cls.__mro__[1:], type(cls)):
            self._seen_class(base)
        if not cls.__flags__ & _HEAP_TYPE:
            return
        self.containers.append(cls)
        attributes = {key: value for key, value in cls.__dict__.items() if key not in _NOT_OF_A_CLASS}
        if package_of(cls) in CLOSED:
            self._note(fact, ".__dict__", tuple((key, Is(attributes[key])) for key in sorted(attributes)))
            return
        children = []
        for key in sorted(attributes):
            value = attributes[key]
            function = function_in(value)
            if isinstance(value, functools._lru_cache_wrapper):
                self.caches.append(value)
            if function is None:
                children.append((f".{key}", value))
                continue
            method = self._note(fact, f".{key}", (type(value), Is(function.__code__)))
            self._methods.setdefault(key, []).append((method, function))
            called = key in self._reached or (key.startswith("__") and key.endswith("__") and key not in _NOT_CALLED)
            if called and not (key == "__init__" and issubclass(cls, nn.Module)):
                self._later(method, [("()", function)])
        self._later(fact, children)

    def _function(self, parent: int, name: str, function: FunctionType) -> None:
        if package_of(function) in CLOSED and function.__closure__ is None:
            self._note(parent, name, Is(function))
            return
        self.containers.append(function)
        fact = self._note(parent, name, (Is(function.__code__),))
        children: list[tuple[str, Any]] = [
            (".__defaults__", function.__defaults__),
            (".__kwdefaults__", function.__kwdefaults__),
        ]
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.containers.append(cell)
            children.append((f".{variable}", cell_contents(cell)))
        children.append((".__dict__", function.__dict__))
        self._later(fact, children)
        if package_of(function) not in CLOSED:
            self._follow(function)

    def _follow(self, function: FunctionType) -> None:
        """Visit what the names in a function's code refer to."""
        names, where = names_in(function.__code__), function.__globals__
        loaded, imported = names_loaded(function.__code__)
        entered: set[int] = set()
        for name in names:
            self._reach(name)
        for name in dict.fromkeys((*loaded, *names)) if "globals" in loaded else loaded:
            if name in where:
                self._global(f"{function.__module__}.", where, name, names, entered)
            elif name in vars(builtins):
                self._global("builtins.", vars(builtins), name, names, entered)
        for name in imported:
            package = str(where.get("__package__") or "")
            for module in (sys.modules.get(name), sys.modules.get(f"{package}.{name}".rstrip("."))):
                if module is not None and _package_of(module) not in CLOSED:
                    self._inside_module(module, names, entered)

    def _reach(self, name: str) -> None:
        """Visit the methods of that name, since they may be called."""
        if name not in self._reached:
            self._reached[name] = None
            for method, function in self._methods.get(name, ()):
                self._pending.append((method, "()", function))

    def _global(self, prefix: str, where: dict[str, Any], name: str, names: tuple[str, ...], entered: set[int]) -> None:
        """Visit a name in a dict of globals; if it is a module, visit what the code's other names refer to in it."""
        value = where[name]
        if (id(where), name) not in self._entries:
            self._entries.add((id(where), name))
            self.containers.append((where, name))
            if not isinstance(value, ModuleType):
                self._pending.append((-1, f"{prefix}{name}", value))
            else:
                self._note(-1, f"{prefix}{name}", Is(value))
        if isinstance(value, ModuleType):
            self._inside_module(value, names, entered)

    def _inside_module(self, module: ModuleType, names: tuple[str, ...], entered: set[int]) -> None:
        """Visit what a function's names refer to in a module; `entered` are the modules already searched for it."""
        inner = module.__dict__
        if id(inner) in entered:
            return
        entered.add(id(inner))
        for other in names:
            if other in inner:
                self._global(f"{module.__name__}.", inner, other, names, entered)


_HEAP_TYPE = 1 << 9
SHARED_GENERATOR: random.Random = random.seed.__self__  # type: ignore[attr-defined]  # behind the functions of `random`
# Owners of builtin methods that are not walked. Capture handles the shared generators of Python, numpy and torch.
_NO_OWNERS = (ModuleType, type(None), random.Random, np.random.RandomState)


def _is_opened(value: Any) -> bool:
    """Whether to visit an object's attributes: they are a user's settings, not the internals of a library."""
    if isinstance(value, (ModuleType, BuiltinFunctionType, GenericAlias)):
        return False
    package = package_of(type(value))
    return package not in CLOSED or type(value).__module__ in _PLAIN_OBJECTS


def _hooks(module: nn.Module) -> Any:
    """The hooks of a module inside a model. A graph would bypass them, so a change of them is a change of the model."""
    attributes = module.__dict__
    registry = attributes.get("_diffusers_hook")
    found = [hook for key in _HOOKS for hook in attributes[key].values()]
    found += [] if attributes.get("_hf_hook") is None else [attributes["_hf_hook"]]
    found += [] if registry is None else registry.hooks.values()
    return tuple(map(Is, found))


def _key(key: Any) -> Any:
    if isinstance(key, (*SCALARS, *BY_TEXT)):
        return type(key), repr(key) if isinstance(key, BY_TEXT) else key
    if isinstance(key, (tuple, frozenset)):
        return type(key), tuple(map(_key, key)) if isinstance(key, tuple) else frozenset(map(_key, key))
    return Is(key)


def referent(reference: Any) -> Any:
    """The object that a weak reference or proxy refers to; None if it is gone."""
    if isinstance(reference, weakref.ref):
        return reference()
    try:
        return reference.__repr__.__self__
    except ReferenceError:
        return None


def _package_of(module: ModuleType) -> str:
    return module.__name__.partition(".")[0]


def package_of(thing: Any) -> str:
    """The top-level package that a class or function belongs to."""
    return str(getattr(thing, "__module__", None) or "builtins").partition(".")[0]


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _slots(cls: type) -> list[str]:
    names = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in names if name not in ("__dict__", "__weakref__")]
