"""Finds the sites of a model: sub-layers, blocks, spans of blocks, or its output, by rule or by globs.

Sites are named here because their names are part of the contract between training and runtime. Importing the contract
must stay light, so torch is imported by the functions that check a module's class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

from harmonica_rt.errors import ArgumentError, SiteError
from harmonica_rt.schedule import site_rule
from harmonica_rt.schedule.site_names import OUTPUT, Span, check_disjoint, is_module, span_of
from harmonica_rt.wrappers import unwrapped

if TYPE_CHECKING:
    from torch import nn

_BY_LEVEL: Mapping[str, Callable[[nn.Module], Iterable[object]]] = {
    "sublayer": site_rule.sublayers,
    "block": site_rule.blocks,
    "span": site_rule.spans,
    "output": lambda model: [OUTPUT],
}


def find_sites(model: nn.Module, patterns: Sequence[str] | None = None, *, level: str | None = None) -> list[str]:
    """The sites of `model`, block by block, in registration (usually also execution) order.

    A sub-layer is named by its module path, `transformer_blocks.3.attn1`. A span of blocks is named
    `transformer_blocks[4:8]` (blocks 4 to 7): what is cached is its residual, what leaves the last block less what
    entered the first. The output is named `harmonica_rt.OUTPUT`.

    Args:
        model: any module. Without `patterns`, its blocks must be in a `ModuleList`, as they are in diffusers.
        patterns: globs over module paths that replace the rule. `*` matches within one path component, `**` matches
            one or more: `"blocks.*.mlp"`, `"**.attn"`. A list of blocks followed by `[start:stop]` is a
            span: `"transformer_blocks[0:4]"`.
        level: `"sublayer"` (the default), `"block"` (each block a span of its own), `"span"` (each list of blocks one
            span) or `"output"`. Not together with `patterns`.

    Raises:
        SiteError: nothing was found, a pattern matches nothing, or two sites overlap.
        ArgumentError: `model` is not a module, `patterns` is not a list of strings, `level` is unknown, or both are
            given.
    """
    model = _checked_model(model)
    if level is not None and level not in _BY_LEVEL:
        raise ArgumentError(f"level is one of {', '.join(map(repr, _BY_LEVEL))}, got {level!r}")
    if level is not None and patterns is not None:
        raise ArgumentError("find_sites takes patterns or a level, not both: the patterns say what the sites are")
    if patterns is None:
        sites = [str(site) for site in _BY_LEVEL[level or "sublayer"](model)]
    else:
        sites = _by_globs(model, patterns)
    if not sites:
        raise SiteError(
            f"no sites were found in {type(model).__name__}: it has no ModuleList of equal blocks with attention. "
            'Choose the sub-layers yourself: find_sites(model, patterns=["blocks.*.mlp"])'
        )
    check_disjoint(sites)
    return sites


def _checked_model(model: object) -> nn.Module:
    """The module whose paths are the sites: `model` without its wrappers."""
    from torch import nn

    if isinstance(model, nn.Module):
        inner = unwrapped(model)
        return inner if isinstance(inner, nn.Module) else model
    name = f"the class {model.__name__}" if isinstance(model, type) else f"an object of class {type(model).__name__}"
    remedy = "; pass the denoiser of the pipeline: find_sites(pipe.transformer)" if hasattr(model, "scheduler") else ""
    raise ArgumentError(f"find_sites takes an nn.Module, got {name}{remedy}")


def check_sites(model: nn.Module, sites: Iterable[str]) -> None:
    """Raise SiteError unless `model` has every site and no two of them overlap."""
    names = list(sites)
    known = dict(model.named_modules())
    check_disjoint(names)
    if OUTPUT in names and OUTPUT in known:
        raise SiteError(
            f"{type(model).__name__} has a module called {OUTPUT!r}, which is the name of its output as a site"
        )
    spans = {site: span_of(site) for site in names}
    for span in spans.values():
        if span is not None and span.path in known:
            _check_span(span, known[span.path])
    missing = [site for site, span in spans.items() if (span.path if span else site) not in known and site != OUTPUT]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise SiteError(
            f"{type(model).__name__} has no module {shown}. The schedule was made for another model; "
            f"this one has the sites that find_sites(model) lists"
        )


def check_modules(sites: Sequence[str], purpose: str) -> None:
    """Raise SiteError if a site is no module, for a purpose that takes modules only."""
    for site in sites:
        if not is_module(site):
            raise SiteError(f"{purpose} takes sub-layers as sites, as find_sites(model) lists them, got {site!r}")


def _is_list(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    from torch import nn

    return isinstance(module, nn.ModuleList | nn.Sequential)


def _check_span(span: Span, blocks: nn.Module) -> None:
    if not _is_list(blocks):
        raise SiteError(f"{span}: {span.path} is a {type(blocks).__name__}; a span takes blocks of an nn.ModuleList")
    if span.stop > len(blocks):
        raise SiteError(f"{span}: {span.path} has {len(blocks)} blocks, so a span of it ends at {len(blocks)} at most")


def _by_globs(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    if isinstance(patterns, str):
        raise SiteError(f'patterns is a list of globs, not one string: find_sites(model, patterns=["{patterns}"])')
    globs = list(patterns) if isinstance(patterns, Iterable) else [None]
    if not all(isinstance(pattern, str) for pattern in globs):
        raise ArgumentError('patterns is a list of globs: find_sites(model, patterns=["blocks.*.mlp"])')
    if not globs:
        raise SiteError("patterns is empty, so it chooses no site; leave it out to find sites by rule")
    names = [name for name, _ in model.named_modules() if name]
    places = {name: place for place, name in enumerate(names)}
    chosen: dict[str, int] = {}
    for pattern in globs:
        matched = _matched(pattern, model, places)
        if not matched:
            raise SiteError(
                f"the pattern {pattern!r} matches no module of {type(model).__name__}: `*` stands for any part of one "
                "name between dots, `**` for one or more names"
            )
        chosen.update(matched)
    return sorted(chosen, key=chosen.__getitem__)


def _matched(pattern: str, model: nn.Module, places: Mapping[str, int]) -> dict[str, int]:
    """The sites that a pattern names, each with the place of its first module."""
    if pattern == OUTPUT and OUTPUT not in places:
        return {OUTPUT: 0}
    span = span_of(pattern)
    regex = _glob_regex(pattern if span is None else span.path)
    matched = {name: place for name, place in places.items() if regex.fullmatch(name)}
    if span is None:
        return matched
    found = [span._replace(path=name) for name in matched if span.path == name or _is_list(model.get_submodule(name))]
    for each in found:
        _check_span(each, model.get_submodule(each.path))
    return {str(each): places[each.blocks[0]] for each in found}


def _glob_regex(pattern: str) -> re.Pattern[str]:
    parts = []
    for component in pattern.split("."):
        if component == "**":
            parts.append(r"[^.]+(?:\.[^.]+)*")
        else:
            parts.append(re.escape(component).replace(r"\*", "[^.]*").replace(r"\?", "[^.]"))
    return re.compile(r"\.".join(parts))
