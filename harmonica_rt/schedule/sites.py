"""Finds the cacheable sub-layers of a model, by one rule for all diffusers transformers or by globs for any module.

The rule: in every `ModuleList` of blocks of one class, the sites are the direct children that are attention or
feed-forward layers. A block that runs both in parallel and joins them in one projection (Flux single blocks) has that
projection as its only site, because caching a site that feeds only another site would be useless. A block that is its
own feed-forward layer (it holds the up and the down projection) has the down projection as a site. A block made of
blocks (HiDream wraps each, Kandinsky 6 joins one for video and one for audio, T5 lists its sub-layers) has the sites of
those.

Sites are named here because their names are part of the contract between training and runtime. Importing the contract
must stay light, so torch is imported by the functions that check a module's class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from harmonica_rt.errors import ArgumentError, SiteError
from harmonica_rt.wrappers import unwrapped

if TYPE_CHECKING:
    from torch import nn

_ATTENTION_NAME = re.compile(r"^((self|cross|joint|spatial|temporal)_)?(attn|attention)(_?\w+)?$")
_FEED_FORWARD_NAME = re.compile(r"^(ff|ffn|mlp|feed_?forward)(_?\w+)?$")
_ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
# T5 calls it dense-activation-dense; AlphaFold and similar models call it a transition
_FEED_FORWARD_CLASS = re.compile(r"feed_?forward|mlp|ffn|dense\w*dense|transition", re.IGNORECASE)
_NORM = re.compile(r"norm|modulation|scale_shift|ada_?ln", re.IGNORECASE)
_UP_AND_DOWN = {
    "up_proj": "down_proj",
    "ff_in": "ff_out",
    "proj_mlp": "proj_out",
}  # a feed-forward layer that is the block itself


def find_sites(model: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """The sites of `model`: dotted module paths, block by block, in registration (usually also execution) order.

    Args:
        model: any module. Without `patterns`, its blocks must be in a `ModuleList`, as they are in diffusers.
        patterns: globs over module paths that replace the rule. `*` matches within one path component, `**` matches
            any number of components: `"blocks.*.mlp"`, `"**.attn"`.

    Raises:
        SiteError: nothing was found, a pattern matches nothing, or one site would lie inside another.
        ArgumentError: `model` is not a module, or `patterns` is not a list of strings.
    """
    model = _checked_model(model)
    sites = list(dict.fromkeys(_by_rule(model))) if patterns is None else _by_globs(model, patterns)
    if not sites:
        raise SiteError(
            f"no sites were found in {type(model).__name__}: it has no ModuleList of equal blocks with attention "
            'or feed-forward children. Choose the sub-layers yourself: find_sites(model, patterns=["blocks.*.mlp"])'
        )
    check_not_nested(sites)
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
    """Raise SiteError if one site lies inside another: reusing the outer one would keep the inner one from running."""
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
                continue  # a block in several places has one set of sites, which run several times
            if any(_is_attention(name.rpartition(".")[2], module) for name, module in block.named_modules()):
                yield from (f"{path}.{index}.{site}" for site in _block_sites(block))


def _block_sites(block: nn.Module) -> list[str]:
    from torch import nn

    children = dict(block.named_children())
    attention = [name for name, child in children.items() if _is_attention(name, child)]
    feed_forward = [name for name, child in children.items() if _is_feed_forward(name, child)]
    if not feed_forward:
        feed_forward = [down for up, down in _UP_AND_DOWN.items() if up in children and down in children]
        if "proj_out" in feed_forward:
            attention = []
    sites = []
    for name, child in children.items():
        if name in attention or name in feed_forward:
            sites.append(name)
        elif isinstance(child, nn.ModuleList):
            sites += [f"{name}.{index}.{site}" for index, part in enumerate(child) for site in _block_sites(part)]
        elif any(_is_attention(*grandchild) for grandchild in child.named_children()):
            sites += [f"{name}.{site}" for site in _block_sites(child)]
    return sites


def _is_attention(name: str, module: nn.Module) -> bool:
    if not _has_parameters(module) or _NORM.search(name) or _NORM.search(type(module).__name__):
        return False
    return bool(_ATTENTION_NAME.match(name) or _ATTENTION_CLASS.search(type(module).__name__))


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    from torch import nn

    if not _has_parameters(module) or isinstance(module, nn.Linear):
        return False
    if _NORM.search(name) or _NORM.search(type(module).__name__):
        return False
    return bool(_FEED_FORWARD_NAME.match(name) or _FEED_FORWARD_CLASS.search(type(module).__name__))


def _has_parameters(module: nn.Module) -> bool:
    """Whether a module has parameters; an activation (`mlp_act`) has none and is not a sub-layer."""
    return next(module.parameters(), None) is not None


def _by_globs(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    if isinstance(patterns, str):
        raise SiteError(f'patterns is a list of globs, not one string: find_sites(model, patterns=["{patterns}"])')
    globs = list(patterns) if isinstance(patterns, Iterable) else [None]
    if not all(isinstance(pattern, str) for pattern in globs):
        raise ArgumentError('patterns is a list of globs: find_sites(model, patterns=["blocks.*.mlp"])')
    if not globs:
        raise SiteError("patterns is empty, so it chooses no site; leave it out to find sites by rule")
    names = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in globs:
        regex = _glob_regex(pattern)
        matched = [name for name in names if regex.fullmatch(name)]
        if not matched:
            raise SiteError(
                f"the pattern {pattern!r} matches no module of {type(model).__name__}: `*` stands for any part of one "
                "name between dots, `**` for any number of names"
            )
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
