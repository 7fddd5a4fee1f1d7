"""Find the cacheable sub-layers of a model: by one rule for all diffusers transformers, or by globs for any module.

The rule: in every `ModuleList` of alike blocks, the direct children that are attention or feed-forward layers. A block
that runs both side by side and joins them in one projection (Flux single blocks) has that projection as its only site,
because a site that feeds nothing but another site would be cached for nothing.

Sites are named here because their names are part of the contract between training and runtime. Importing the contract
must stay light, so torch is imported by the functions that ask for a module's class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from harmonica_rt.errors import SiteError

if TYPE_CHECKING:
    from torch import nn

_ATTENTION_NAME = re.compile(r"^((self|cross|joint|spatial|temporal)_)?(attn|attention)(_?\w+)?$")
_FEED_FORWARD_NAME = re.compile(r"^(ff|ffn|mlp|feed_?forward)(_?\w+)?$")
_ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
_FEED_FORWARD_CLASS = re.compile(r"feed_?forward|mlp|ffn", re.IGNORECASE)
_NORM = re.compile(r"norm|modulation|scale_shift", re.IGNORECASE)


def find_sites(model: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """The sites of `model`: dotted module paths, block by block, in the order they are registered (as a rule, run) in.

    Args:
        model: any module. Without `patterns` its blocks must sit in a `ModuleList`, as they do in diffusers.
        patterns: globs over module paths that replace the rule. `*` matches within one path component, `**` matches
            any number of components: `"blocks.*.mlp"`, `"**.attn"`.

    Raises:
        SiteError: nothing was found, a pattern matches nothing, or one site would lie inside another.
    """
    sites = list(_by_rule(model)) if patterns is None else _by_globs(model, patterns)
    if not sites:
        raise SiteError(
            f"no sites were found in {type(model).__name__}: it has no ModuleList of alike blocks with attention or "
            'feed-forward children. Choose the sub-layers yourself: find_sites(model, patterns=["blocks.*.mlp"])'
        )
    check_not_nested(sites)
    return sites


def check_sites(model: nn.Module, sites: Iterable[str]) -> None:
    """Raise SiteError unless every site is a module of `model` and none lies inside another."""
    names = list(sites)
    known = dict(model.named_modules())
    missing = [site for site in names if site not in known]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise SiteError(
            f"{type(model).__name__} has no module {shown}. The schedule was made for another model; "
            f"this one has the sites that find_sites(model) lists"
        )
    check_not_nested(names)


def check_not_nested(sites: Sequence[str]) -> None:
    """Raise SiteError where one site lies inside another: reusing the outer one would starve the inner one."""
    chosen = set(sites)
    for site in sites:
        parent = site
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent in chosen:
                raise SiteError(f"site {site} lies inside site {parent}; choose one of the two")


def _by_rule(model: nn.Module) -> Iterator[str]:
    from torch import nn

    for path, blocks in model.named_modules():
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            continue
        if len({type(block) for block in blocks}) != 1:
            continue
        first_places = {id(block): index for index, block in reversed(list(enumerate(blocks)))}
        for index, block in enumerate(blocks):
            if first_places[id(block)] != index:
                continue  # one block in several places is one set of sites, which run several times
            for child in _block_sites(block):
                yield f"{path}.{index}.{child}"


def _block_sites(block: nn.Module) -> list[str]:
    children = dict(block.named_children())
    attention = [name for name, child in children.items() if _is_attention(name, child)]
    feed_forward = [name for name, child in children.items() if _is_feed_forward(name, child)]
    if not attention:
        return []
    if not feed_forward and "proj_mlp" in children and "proj_out" in children:
        return ["proj_out"]
    return [name for name in children if name in attention or name in feed_forward]


def _is_attention(name: str, module: nn.Module) -> bool:
    if _NORM.search(name) or _NORM.search(type(module).__name__):
        return False
    return bool(_ATTENTION_NAME.match(name) or _ATTENTION_CLASS.search(type(module).__name__))


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    from torch import nn

    if _NORM.search(name) or _NORM.search(type(module).__name__) or isinstance(module, nn.Linear):
        return False
    return bool(_FEED_FORWARD_NAME.match(name) or _FEED_FORWARD_CLASS.search(type(module).__name__))


def _by_globs(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    if isinstance(patterns, str):
        raise SiteError(f'patterns is a list of globs, not one string: find_sites(model, patterns=["{patterns}"])')
    names = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        regex = _glob_regex(pattern)
        matched = [name for name in names if regex.fullmatch(name)]
        if not matched:
            raise SiteError(f"the pattern {pattern!r} matches no module of {type(model).__name__}")
        chosen.update(matched)
    return [name for name in names if name in chosen]


def _glob_regex(pattern: str) -> re.Pattern[str]:
    parts = []
    for component in pattern.split("."):
        if component == "**":
            parts.append(r"[^.]+(?:\.[^.]+)*")
        else:
            parts.append(re.escape(component).replace(r"\*", "[^.]*").replace(r"\?", "[^.]"))
    return re.compile(r"\.".join(parts))
