"""The names that Python code uses: globals it looks up, modules it imports, attributes it gets or calls."""

from __future__ import annotations

import dis
import functools
from types import CodeType, FunctionType
from typing import Any


@functools.lru_cache(maxsize=4096)
def names_loaded(code: CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The global names that a code object and those nested in it look up, and the modules that they import."""
    loaded, imported = dict[str, None](), dict[str, None]()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            loaded[step.argval] = None
        elif step.opname == "IMPORT_NAME":
            parts = step.argval.split(".")
            imported.update(dict.fromkeys(".".join(parts[:n]) for n in range(1, len(parts) + 1)))
        elif step.opname == "IMPORT_FROM" and imported:
            imported[f"{next(reversed(imported))}.{step.argval}"] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            for names, found in zip((loaded, imported), names_loaded(constant), strict=True):
                names.update(dict.fromkeys(found))
    return tuple(loaded), tuple(imported)


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> tuple[str, ...]:
    """All names in a code object and those nested in it. Strings count too, as in `getattr(self, "norm")`."""
    found = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found.update(dict.fromkeys(names_in(constant)))
        elif isinstance(constant, str) and constant.isidentifier():
            found[constant] = None
    return tuple(found)


def function_in(value: Any) -> FunctionType | None:
    """The function inside a method, a property or the like; None if there is none."""
    for attribute in ("__func__", "fget", "func", "__wrapped__"):
        inner = getattr(value, attribute, None) if not isinstance(value, FunctionType) else None
        if isinstance(inner, FunctionType):
            return inner
    return value if isinstance(value, FunctionType) else None
