"""Reads a file of options in YAML, strictly: one level of names, values that are plain or lists of plain values.

Hazard: YAML readers build objects, follow aliases into exponentially large values and take the last of two equal keys.
Here the nodes are walked instead, two levels deep, and an alias or a key that occurs twice is an error.
"""

from __future__ import annotations

from typing import Any

from harmonica_rt.errors import ScheduleError
from harmonica_rt.untrusted.text import one_line

_LARGEST, _BRACKETS = 16_384, 100  # bytes and brackets: PyYAML takes the square of either in time


def read_options(data: bytes, section: str, refusal: str) -> dict[str, object]:
    """The options in a YAML file: those of its section, or of the whole file if it has no such section.

    Raises:
        ScheduleError: the data is not YAML of this form. The message begins with `refusal`.
    """
    import yaml  # type: ignore[import-untyped]

    if len(data) > _LARGEST:
        raise ScheduleError(f"{refusal}: {len(data)} bytes, more than {_LARGEST}")
    try:
        text = data.decode("utf-8")
        if text.count("[") + text.count("{") > _BRACKETS:
            raise ScheduleError(f"{refusal}: more than {_BRACKETS} brackets")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ScheduleError(f"{refusal}: it has aliases")
        loader = yaml.SafeLoader(text)
        options = _mapping(loader.get_single_node(), refusal)
        inner = options.get(section)
        options = options if inner is None else _mapping(inner, f"{refusal}: {section}")
        return {name: _value(loader, node, f"{refusal}: {one_line(name)}") for name, node in options.items()}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ScheduleError(f"{refusal}: {one_line(error)}") from error


def _mapping(node: Any, where: str) -> dict[str, Any]:
    """The nodes of a mapping by name. Any: PyYAML has no types."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        raise ScheduleError(f"{where}: expected a mapping of names to values")
    found: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ScheduleError(f"{where}: expected names as keys")
        if key.value in found:
            raise ScheduleError(f"{where}: {one_line(key.value)}: the field occurs more than once; keep one")
        found[key.value] = value
    return found


def _value(loader: Any, node: Any, where: str) -> object:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return [_scalar(loader, item, where) for item in node.value]
    return _scalar(loader, node, where)


def _scalar(loader: Any, node: Any, where: str) -> object:
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        raise ScheduleError(f"{where}: expected a plain value or a list of plain values")
    try:
        return loader.construct_object(node)
    except ValueError as error:  # a number or a date that Python cannot make
        raise ScheduleError(f"{where}: {one_line(error)}") from error
