"""Walks over a model and notes everything that its forward can use. See `facts`.

The walk reaches the module tree with its plain attributes and all objects that these hold; the classes of all of them;
and, starting from `forward` and following the names in code (`code_walk`), the methods, functions and module attributes
in use. `scope` says which of them count.
"""

from __future__ import annotations

import functools
import random
import threading
import weakref
from collections import defaultdict, deque
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from harmonica_rt.model.code_walk import CodeWalk
from harmonica_rt.model.fact_table import BY_TEXT, MODEL_TENSOR, SAME_AS, SCALARS, Is, comparable_key
from harmonica_rt.model.findings import Agenda, Findings
from harmonica_rt.model.forward import own_forward
from harmonica_rt.model.hidden_state import SHARED_GENERATOR, Hidden, hidden_state, is_opaque
from harmonica_rt.model.hooks import all_hooks, diffusers_hooks, forward_hooks, forward_hooks_of_every_module
from harmonica_rt.model.identity import items_of, referent
from harmonica_rt.model.scope import is_opened, is_written_in_python, own_attributes
from harmonica_rt.model.tensors import metadata

LARGEST_CONTAINER = 10_000  # items; a larger container counts only by the identity of its items

# Owners of builtin methods that are not walked. Capture handles the shared generators of Python, numpy and torch.
_NO_OWNERS = (ModuleType, type(None), random.Random, np.random.RandomState)


def walk(model: nn.Module) -> Findings:
    """Visit all that the forward of `model` can use, in a fixed order, so that equal models give equal facts."""
    found = Findings()
    _Walk(model, found).run()
    return found


class _Walk:
    def __init__(self, model: nn.Module, found: Findings) -> None:
        self._root = model
        self._tree = {id(module) for module in model.modules()}
        self._found = found
        self._agenda = Agenda()
        self._code = CodeWalk(found, self._agenda)

    def run(self) -> None:
        everywhere = forward_hooks_of_every_module()
        self._found.containers.extend(everywhere)
        self._note(-1, "hooks of every module", tuple(Is(hook) for hooks in everywhere for hook in hooks.values()))
        self._visit(-1, "", self._root)
        while (visit := self._agenda.next()) is not None:
            self._visit(*visit)

    def _note(self, parent: int, name: str, value: Any) -> int:
        return self._found.facts.add(parent, name, value)

    def _visit(self, parent: int, name: str, value: Any) -> None:
        kind = type(value)
        if kind in SCALARS:
            self._note(parent, name, (kind, value))
            if kind is str and value.isidentifier():
                self._code.reach(value)  # getattr(self, self.kind)
        elif kind in BY_TEXT:
            self._note(parent, name, (kind, repr(value)))
        elif kind is not tuple and id(value) in self._agenda.fact_of:  # a tuple counts by its items wherever it is
            self._note(parent, name, (SAME_AS, self._agenda.fact_of[id(value)]))
        else:
            self._agenda.enter(value, len(self._found.facts))
            self._open(parent, name, value)

    def _open(self, parent: int, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(parent, name, value)
        elif issubclass(type(value), nn.Module):  # isinstance() is fooled by proxies and compiled models
            self._module(parent, name, value)
        elif isinstance(value, type):
            self._code.visit_class(parent, name, value)
        elif issubclass(type(value), (dict, list, tuple, set, frozenset, deque)):
            self._container(parent, name, value)
        elif isinstance(value, FunctionType):
            self._code.visit_function(parent, name, value)
        elif isinstance(value, MethodType) and value.__self__ is SHARED_GENERATOR:
            self._note(parent, name, ("method", Is(value.__func__)))
        elif isinstance(value, MethodType):
            fact = self._note(parent, name, ("method",))
            self._agenda.later(fact, [(".__func__", value.__func__), (".__self__", value.__self__)])
        elif isinstance(value, functools.partial):
            fact = self._note(parent, name, ("partial",))
            self._agenda.later(fact, [(".func", value.func), (".args", value.args), (".keywords", value.keywords)])
        elif (hidden := hidden_state(value)) is not None:
            state = hidden.get()
            self._found.hidden.append((hidden, state))
            self._note(parent, name, (Is(type(value)), state))
        elif is_opaque(value):
            self._found.opaque.append(f"{name.lstrip('.')} is a {type(value).__name__}, whose state cannot be read")
            self._note(parent, name, Is(value))
        elif isinstance(value, (weakref.ref, *weakref.ProxyTypes)):
            fact = self._note(parent, name, ("weakly",))
            self._agenda.later(fact, [("()", referent(value))])
        elif isinstance(value, BuiltinMethodType) and not isinstance(value.__self__, _NO_OWNERS):
            fact = self._note(parent, name, ("method", value.__name__))
            self._agenda.later(fact, [(".__self__", value.__self__)])
        elif is_opened(value):
            self._object(parent, name, value)
        else:
            fact = self._note(parent, name, Is(value))
            if isinstance(value, functools._lru_cache_wrapper):
                self._found.caches.append(value)
                self._agenda.later(fact, [(".__wrapped__", value.__wrapped__)])

    def _tensor(self, parent: int, name: str, tensor: torch.Tensor) -> None:
        self._found.tensors.append(tensor)
        # A tensor has a single weak reference while it lives, which identifies it without keeping it alive.
        fact = self._note(parent, name, (Is(weakref.ref(tensor)), metadata(tensor)))
        self._agenda.later(fact, [(".__dict__", tensor.__dict__)])

    def _container(self, parent: int, name: str, value: Any) -> None:
        kind = type(value)
        items = items_of(value)
        if not isinstance(value, (tuple, frozenset)):
            self._found.containers.append(value)
        if len(items) > LARGEST_CONTAINER:
            fact = self._note(parent, name, (Is(value), tuple(map(Is, items))))
        elif isinstance(value, dict):
            fact = self._note(parent, name, (kind, tuple(map(comparable_key, dict.keys(value)))))
            self._agenda.later(fact, [(f"[{key!r:.80}]", item) for key, item in dict.items(value)])
        elif isinstance(value, (set, frozenset)):
            fact = self._note(parent, name, (kind, frozenset(map(comparable_key, items))))
        else:
            fact = self._note(parent, name, (kind, len(items)))
            self._agenda.later(fact, [(f"[{index}]", item) for index, item in enumerate(items)])
        if is_written_in_python(kind) or kind is defaultdict:  # a subclass, whose objects may have attributes
            self._code.see_class(kind)
            self._agenda.later(fact, [(".__dict__", getattr(value, "__dict__", None))])
            if isinstance(value, defaultdict):
                self._found.hidden.append((Hidden(lambda: id(value.default_factory)), id(value.default_factory)))
                self._agenda.later(fact, [(".default_factory", value.default_factory)])

    def _object(self, parent: int, name: str, value: Any) -> None:
        self._code.see_class(type(value))
        slots = [slot for slot in _slots(type(value)) if hasattr(value, slot)]
        attributes = {slot: getattr(value, slot) for slot in slots}
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):  # an object that poses as a class may have another mapping
            attributes |= own
            # `own` is this thread's
            self._found.containers.append(own if isinstance(value, threading.local) else value)
        self._found.containers.extend((value, slot) for slot in slots)
        # objects of classes written in C hold more than they show
        in_c = any(base is not object and not is_written_in_python(base) for base in type(value).__mro__)
        fact = self._note(parent, name, (Is(type(value)), tuple(sorted(attributes)), Is(value) if in_c else None))
        self._agenda.later(fact, [(f".{key}", attributes[key]) for key in sorted(attributes)])

    def _module(self, parent: int, name: str, module: nn.Module) -> None:
        root, attributes, containers = module is self._root, module.__dict__, self._found.containers
        self._code.see_class(type(module))
        containers.append(module)
        names = own_attributes(module, root=root)
        # A graph would bypass the hooks of a module inside the model, so a change of them is a change of the model.
        hooks = tuple(map(Is, all_hooks(module))) if not root else None
        fact = self._note(parent, name, (Is(type(module)), tuple(names), hooks))
        children: list[tuple[str, Any]] = []
        if root:
            own = own_forward(module)
            children.append((".forward", getattr(own, "__func__", own)))
        children += [(f".{key}", attributes[key]) for key in names]
        for held in ("_parameters", "_buffers"):
            tensors = attributes[held]
            if tensors:
                containers.append(tensors)
            for key, tensor in tensors.items():
                if id(module) in self._tree:
                    self._model_tensor(fact, f".{key}", tensor)
                else:
                    children.append((f".{key}", tensor))
        containers += forward_hooks(module)
        if (registered := diffusers_hooks(module)) is not None:
            containers.append(registered)
        if modules := attributes["_modules"]:
            containers.append(modules)
            children += [(f".{key}", child) for key, child in modules.items()]
        self._agenda.later(fact, children)

    def _model_tensor(self, parent: int, name: str, tensor: torch.Tensor | None) -> None:
        """Note a parameter or buffer by its metadata: plans use its current values, and fetch a replaced one anew."""
        if tensor is None:
            self._note(parent, name, (type(None), None))
        elif id(tensor) in self._agenda.fact_of:
            self._note(parent, name, (SAME_AS, self._agenda.fact_of[id(tensor)]))
        else:
            self._agenda.fact_of[id(tensor)] = self._note(parent, name, (MODEL_TENSOR, metadata(tensor)))


def _slots(cls: type) -> list[str]:
    names = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in names if name not in ("__dict__", "__weakref__")]
