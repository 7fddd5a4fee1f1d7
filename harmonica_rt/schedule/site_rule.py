"""Finds the blocks of a model, and the cacheable sub-layers in them, by one rule for all diffusers transformers.

The rule: in every `ModuleList` of blocks of one class, the sites are the direct children that are attention or
feed-forward layers. A block that runs both in parallel and joins them in one projection (Flux single blocks) has that
projection as its only site, because caching a site that feeds only another site would be useless. A block that is its
own feed-forward layer (it holds the up and the down projection) has the down projection as a site. A block made of
blocks (HiDream wraps each, Kandinsky 6 joins one for video and one for audio, T5 lists its sub-layers) has the sites of
those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from harmonica_rt.schedule.site_names import Span

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


def sublayers(model: nn.Module) -> list[str]:
    """The paths of the cacheable sub-layers, block by block, in registration order."""
    found = (f"{path}.{index}.{site}" for path, blocks in _block_lists(model) for index, site in _sites_of(blocks))
    return list(dict.fromkeys(found))


def blocks(model: nn.Module) -> list[Span]:
    """Each block as a span of one block, in registration order; a block in several places once."""
    found: dict[int, Span] = {}
    for span in spans(model):
        for index, path in enumerate(span.blocks):
            found.setdefault(id(model.get_submodule(path)), Span(span.path, index, index + 1))
    return list(found.values())


def spans(model: nn.Module) -> list[Span]:
    """Each list of blocks with sub-layers as one span; a list inside a block of another one is a part of that block."""
    found: list[Span] = []
    for path, modules in _block_lists(model):
        inside = any(path.startswith(f"{outer.path}.") for outer in found)
        if not inside and any(_sites_of(modules)):
            found.append(Span(path, 0, len(modules)))
    return found


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of blocks of one class, with their paths."""
    from torch import nn

    for path, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and len({type(block) for block in modules}) == 1:
            yield path, modules


def _sites_of(blocks: nn.ModuleList) -> Iterator[tuple[int, str]]:
    """The sub-layers of each block: its index, and the path inside it."""
    first_places = {id(block): index for index, block in reversed(list(enumerate(blocks)))}
    for index, block in enumerate(blocks):
        # a block in several places has one set of sites, which run several times
        if first_places[id(block)] == index and _has_attention(block):
            yield from ((index, site) for site in _block_sites(block))


def _has_attention(block: nn.Module) -> bool:
    return any(_is_attention(name.rpartition(".")[2], module) for name, module in block.named_modules())


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
