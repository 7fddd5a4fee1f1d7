"""What the name of a site says: a module, a span of blocks, or the denoiser's output.

`transformer_blocks.3.attn1` is a module, `transformer_blocks[4:8]` the span of blocks 4 to 7 of a list of blocks, and
`OUTPUT` what the denoiser returns. Sites of a schedule never overlap: reusing one would keep the other from running.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from harmonica_rt.errors import SiteError

OUTPUT = "output"
"""The site that is the denoiser's output. A step that reuses it computes nothing but the weighted sum."""

_LIKE_A_SPAN = re.compile(r".*\[(?:[^\]]*:[^\]]*|\d+)\]")
_SPAN = re.compile(r"([^\[\]]+)\[(\d{1,4}):(\d{1,4})\]")


class Span(NamedTuple):
    """Blocks `start` to `stop - 1` of the list of blocks at `path`."""

    path: str
    start: int
    stop: int

    @property
    def blocks(self) -> tuple[str, ...]:
        """The paths of the blocks."""
        return tuple(f"{self.path}.{index}" for index in range(self.start, self.stop))

    def __str__(self) -> str:
        return f"{self.path}[{self.start}:{self.stop}]"


def span_of(site: str) -> Span | None:
    """The span that a site names; None if it names a module or the output.

    Raises:
        SiteError: the name ends like that of a span, but is none.
    """
    if _LIKE_A_SPAN.fullmatch(site) is None:
        return None
    found = _SPAN.fullmatch(site)
    if found is None:
        raise SiteError(
            f"{site!r} is no span of blocks: transformer_blocks[0:4] is that of blocks 0 to 3, transformer_blocks[4:5] "
            "block 4 alone"
        )
    span = Span(found[1], int(found[2]), int(found[3]))
    if str(span) != site:
        raise SiteError(f"{site!r}: expected numbers without leading zeros, as in {str(span)!r}")
    if span.start >= span.stop:
        raise SiteError(f"{site!r} holds no block: expected path[start:stop] with start < stop")
    return span


def is_module(site: str) -> bool:
    """Whether a site is a module, neither a span nor the output."""
    return site != OUTPUT and span_of(site) is None


def check_disjoint(sites: Sequence[str]) -> None:
    """Raise SiteError if two sites overlap: a part of the model would belong to both."""
    if OUTPUT in sites and len(sites) > 1:
        other = next(site for site in sites if site != OUTPUT)
        raise SiteError(f"site {other} is a part of what the site {OUTPUT!r} replaces; choose one of the two")
    owners: dict[str, str] = {}
    for site in sites:
        span = span_of(site)
        for path in span.blocks if span is not None else (site,):
            if path in owners:
                raise SiteError(f"sites {owners[path]} and {site} overlap in {path}; choose one of the two")
            owners[path] = site
    for path, site in owners.items():
        parent = path
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent in owners:
                raise SiteError(f"site {site} lies inside site {owners[parent]}; choose one of the two")
