"""The books of InvarDiff (arXiv 2512.05134): which steps are reused and, in the other steps, which modules.

`step_cache_book` has one bool per step, every other book one per step and block; true = reuse. DiT has the books
`msa_cache_book` and `mlp_cache_book`; those of Flux are in two mappings, `transformer_cache_book` and
`single_transformer_cache_book`, by kind of module. A module is reused from the latest step that computed it. In a
reused step, the other books are void.

Hazard: a reused step of InvarDiff takes over the last hidden state of the blocks. If the sites are the modules inside
the blocks, it reuses all of them here, and so adds their residuals to the new input of the blocks. If the only site is
the last block, it is InvarDiff's step exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import check_sequence
from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.format import read_bytes, read_object
from harmonica_rt.schedule.producers import mask_column
from harmonica_rt.untrusted.text import one_line

STEPS = "step_cache_book"
DIT = {"msa_cache_book": "transformer_blocks.*.attn1", "mlp_cache_book": "transformer_blocks.*.ff"}
FLUX = {
    "transformer_cache_book.attn": "transformer_blocks.*.attn",
    "transformer_cache_book.context_attn": "transformer_blocks.*.attn",
    "transformer_cache_book.ff": "transformer_blocks.*.ff",
    "transformer_cache_book.context_ff": "transformer_blocks.*.ff_context",
    "transformer_cache_book.ip_attn": "transformer_blocks.*.attn",
    "single_transformer_cache_book.attn": "single_transformer_blocks.*.attn",
    "single_transformer_cache_book.mlp": "single_transformer_blocks.*.act_mlp",
}
"""Book -> the sites of diffusers' model that it is about; a dot separates a mapping of books and a book in it."""

_JOINED = ("single_transformer_blocks.*.proj_out", ("attn", "act_mlp"))  # a site that takes just these two outputs

Mask = NDArray[np.bool_]


def read_books(source: str) -> Mapping[str, object]:
    """The content of a file of books.

    Raises:
        ScheduleFileNotFoundError: there is no such file.
        ScheduleError: it is no JSON object.
    """
    return read_object(read_bytes(source), "not a file of InvarDiff's books")


def mask_of_books(books: Mapping[str, object], sites: Sequence[str]) -> Mask:
    """The mask `[steps, sites]`, True = compute.

    Raises:
        ScheduleError: a book is missing, unknown, or of another shape than its sites; or it reuses what is no site.
    """
    if STEPS not in books:
        raise ScheduleError(f"{STEPS}: missing book; InvarDiff's files have one bool per step there")
    computed: Mask = np.logical_not(mask_column(check_sequence(books[STEPS], STEPS), STEPS))
    computed[0] = True  # there is nothing to reuse yet, and InvarDiff's code for Flux says so
    mask = np.repeat(computed[:, None], len(sites), axis=1)
    reused: dict[str, Mask] = {}  # pattern of sites -> [steps, blocks]
    for key, rows in _books_of_modules(books).items():
        pattern = (DIT | FLUX).get(key)
        if pattern is None:
            raise ScheduleError(f"{one_line(key)}: no book of InvarDiff that is known here; they are {[*DIT, *FLUX]}")
        own = _rows(rows, key, computed)
        if pattern in reused and reused[pattern].shape != own.shape:
            raise ScheduleError(f"{key}: expected as many blocks as in the other books of {pattern}")
        reused[pattern] = own & reused.get(pattern, own)
    for pattern, own in _joined(reused, sites).items():
        places = [place for place, site in enumerate(sites) if fnmatchcase(site, pattern)]
        if places and len(places) != own.shape[1]:
            raise ScheduleError(f"{pattern}: the books have {own.shape[1]} blocks, and {len(places)} sites match this")
        if not places and own.any():
            raise ScheduleError(
                f"the books reuse {pattern} in steps that are not reused as a whole, and no site matches this; add "
                "these sites"
            )
        mask[:, places] &= ~own[:, : len(places)]
    return mask


def text_of_books(schedule: ScheduleData) -> str:
    """The file of books for a schedule; a step that reuses all sites is a reused step.

    Raises:
        ScheduleError: the schedule has weights, or sites that no book of DiT or of Flux is about.
    """
    if schedule.weights is not None:
        raise ScheduleError("this schedule has weights, and InvarDiff's books hold none; with_weights(None) drops them")
    joined, parts = _JOINED
    found = {pattern: _places(schedule, pattern) for pattern in {*DIT.values(), *FLUX.values()}}
    whole = _places(schedule, joined)
    for part in parts if whole else ():
        found[joined.replace("proj_out", part)] = whole
    names = DIT if found[DIT["msa_cache_book"]] else FLUX
    covered = {place for pattern in names.values() for place in found[pattern]}
    if left := [site for place, site in enumerate(schedule.sites) if place not in covered]:
        raise ScheduleError(f"{left[0]}: InvarDiff has no book for it; its books are about {sorted({*names.values()})}")
    reused: Mask = np.logical_not(schedule.compute.any(axis=1))
    books: dict[str, object] = {STEPS: reused.tolist()}
    for key, pattern in names.items():
        outer, _, inner = key.rpartition(".")
        blocks = max(len(found[other]) for name, other in names.items() if name.rpartition(".")[0] == outer)
        own = ~schedule.compute[:, found[pattern]] if found[pattern] else np.repeat(reused[:, None], blocks, axis=1)
        group = books.setdefault(outer, {}) if outer else books
        if isinstance(group, dict):
            group[inner] = own.tolist()
    return json.dumps(books, indent=2) + "\n"


def _places(schedule: ScheduleData, pattern: str) -> list[int]:
    return [place for place, site in enumerate(schedule.sites) if fnmatchcase(site, pattern)]


def _books_of_modules(books: Mapping[str, object]) -> dict[str, object]:
    """All books but the one of steps; those inside a mapping as `mapping.book`."""
    found: dict[str, object] = {}
    for key, value in books.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif key != STEPS:
            found[key] = value
    return found


def _rows(rows: object, key: str, computed: Mask) -> Mask:
    """A book as bools `[steps, blocks]`, True = reuse; False in steps that are reused as a whole, and in step 0."""
    columns = [mask_column(row, f"{key}[{step}]") for step, row in enumerate(check_sequence(rows, key))]
    if len(columns) != len(computed):
        raise ScheduleError(f"{key}: expected one row per step ({len(computed)} by {STEPS}), got {len(columns)}")
    if len({len(column) for column in columns}) != 1:
        raise ScheduleError(f"{key}: expected rows of one length, one entry per block")
    book: Mask = np.stack(columns) & computed[:, None]
    book[0] = False
    return book


def _joined(reused: dict[str, Mask], sites: Sequence[str]) -> dict[str, Mask]:
    """The books, with those of the two outputs that a projection takes replaced by one of the projection, if a site."""
    joined, parts = _JOINED
    if not any(fnmatchcase(site, joined) for site in sites):
        return reused
    names = [joined.replace("proj_out", part) for part in parts]
    books = [reused[name] for name in names if name in reused]
    if len(books) == 1 or (len(books) == 2 and not np.array_equal(books[0], books[1])):
        raise ScheduleError(
            f"the books reuse one of {' and '.join(names)} where they compute the other, and the site {joined} takes "
            "both; pass these two as sites"
        )
    rest = {name: book for name, book in reused.items() if name not in names}
    return rest | ({joined: books[0]} if books else {})
