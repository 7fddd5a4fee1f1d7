"""Walks over the code of a model: classes, functions, and what the names in them refer to.

A name in code may be a global, a module or an attribute of any object. So globals and modules are searched for it, and
every method of that name of every class found counts as called.
"""

from __future__ import annotations

import builtins
import functools
import sys
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from harmonica_rt.model.code_names import function_in, names_in, names_loaded
from harmonica_rt.model.fact_table import Is
from harmonica_rt.model.findings import Agenda, Findings
from harmonica_rt.model.identity import cell_contents
from harmonica_rt.model.scope import (
    CALLED_UNNAMED,
    CLOSED,
    class_attributes,
    is_called_by_python,
    is_written_in_python,
    package_of,
)


class CodeWalk:
    """The part of one walk that visits code; it adds to the findings and the agenda of the whole walk."""

    def __init__(self, found: Findings, agenda: Agenda) -> None:
        self._found = found
        self._agenda = agenda
        self._entries: set[tuple[int, str]] = set()  # (id of a dict of globals, name) of the names watched
        self._reached: dict[str, None] = dict.fromkeys(CALLED_UNNAMED)
        self._methods: dict[str, list[tuple[int, FunctionType]]] = {}

    def reach(self, name: str) -> None:
        """Visit the methods of that name, since they may be called."""
        if name not in self._reached:
            self._reached[name] = None
            for method, function in self._methods.get(name, ()):
                self._agenda.later(method, [("()", function)])

    def see_class(self, cls: type) -> None:
        """Visit the class of an object. It is reached without a name, so it has no parent fact."""
        if id(cls) not in self._agenda.fact_of:
            self._agenda.enter(cls, len(self._found.facts))
            self.visit_class(-1, f"{cls.__module__}.{cls.__qualname__}", cls)

    def visit_class(self, parent: int, name: str, cls: type) -> None:
        """Note a class, its bases and its attributes; methods only count by their code until they are reached."""
        found = self._found
        fact = found.facts.add(parent, name, Is(cls))
        for base in (*cls.__mro__[1:], type(cls)):
            self.see_class(base)
        if not is_written_in_python(cls):
            return
        found.containers.append(cls)
        attributes = class_attributes(cls)
        if package_of(cls) in CLOSED:
            found.facts.add(fact, ".__dict__", tuple((key, Is(attributes[key])) for key in sorted(attributes)))
            return
        children = []
        for key in sorted(attributes):
            value = attributes[key]
            function = function_in(value)
            if isinstance(value, functools._lru_cache_wrapper):
                found.caches.append(value)
            if function is None:
                children.append((f".{key}", value))
                continue
            method = found.facts.add(fact, f".{key}", (type(value), Is(function.__code__)))
            self._methods.setdefault(key, []).append((method, function))
            # A module's constructor has run before any forward does.
            called = key in self._reached or is_called_by_python(key)
            if called and not (key == "__init__" and issubclass(cls, nn.Module)):
                self._agenda.later(method, [("()", function)])
        self._agenda.later(fact, children)

    def visit_function(self, parent: int, name: str, function: FunctionType) -> None:
        """Note a function with its defaults and closure, and follow the names in its code."""
        found = self._found
        if package_of(function) in CLOSED and function.__closure__ is None:
            found.facts.add(parent, name, Is(function))
            return
        found.containers.append(function)
        fact = found.facts.add(parent, name, (Is(function.__code__),))
        children: list[tuple[str, Any]] = [
            (".__defaults__", function.__defaults__),
            (".__kwdefaults__", function.__kwdefaults__),
        ]
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            found.containers.append(cell)
            children.append((f".{variable}", cell_contents(cell)))
        children.append((".__dict__", function.__dict__))
        self._agenda.later(fact, children)
        if package_of(function) not in CLOSED:
            self._follow(function)

    def _follow(self, function: FunctionType) -> None:
        """Visit what the names in a function's code refer to."""
        names, where = names_in(function.__code__), function.__globals__
        loaded, imported = names_loaded(function.__code__)
        entered: set[int] = set()
        for name in names:
            self.reach(name)
        # Code that calls globals() may look up any name in it, one in a string included.
        for name in dict.fromkeys((*loaded, *names)) if "globals" in loaded else loaded:
            if name in where:
                self._visit_global(f"{function.__module__}.", where, name, names, entered)
            elif name in vars(builtins):
                self._visit_global("builtins.", vars(builtins), name, names, entered)
        for name in imported:
            package = str(where.get("__package__") or "")
            for module in (sys.modules.get(name), sys.modules.get(f"{package}.{name}".rstrip("."))):
                if module is not None and module.__name__.partition(".")[0] not in CLOSED:
                    self._search_module(module, names, entered)

    def _visit_global(
        self, prefix: str, where: dict[str, Any], name: str, names: tuple[str, ...], entered: set[int]
    ) -> None:
        """Visit a name in a dict of globals; if it is a module, visit what the code's other names refer to in it."""
        value = where[name]
        if (id(where), name) not in self._entries:
            self._entries.add((id(where), name))
            self._found.containers.append((where, name))
            if not isinstance(value, ModuleType):
                self._agenda.later(-1, [(f"{prefix}{name}", value)])
            else:
                self._found.facts.add(-1, f"{prefix}{name}", Is(value))
        if isinstance(value, ModuleType):
            self._search_module(value, names, entered)

    def _search_module(self, module: ModuleType, names: tuple[str, ...], entered: set[int]) -> None:
        """Visit what a function's names refer to in a module; `entered` are the modules already searched for it."""
        inner = module.__dict__
        if id(inner) in entered:
            return
        entered.add(id(inner))
        for other in names:
            if other in inner:
                self._visit_global(f"{module.__name__}.", inner, other, names, entered)
