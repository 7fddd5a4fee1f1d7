"""Books of InvarDiff: files as it writes them, with what its loop does at each step as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleError

STEPS, BLOCKS = 6, 3
DIT = [f"transformer_blocks.{block}.{part}" for block in range(BLOCKS) for part in ("attn1", "ff")]
FLUX = [f"transformer_blocks.{block}.{part}" for block in range(2) for part in ("attn", "ff", "ff_context")] + [
    f"single_transformer_blocks.{block}.{part}" for block in range(BLOCKS) for part in ("attn", "act_mlp")
]
JOINED = [site for site in FLUX if "single" not in site] + [
    f"single_transformer_blocks.{block}.proj_out" for block in range(BLOCKS)
]


def random_book(seed: int, blocks: int = BLOCKS) -> list[list[bool]]:
    book = np.random.default_rng(seed).random((STEPS, blocks)) < 0.5
    book[0] = False
    return book.tolist()


def dit_books() -> dict[str, Any]:
    steps = [False, False, True, False, True, False]
    return {"step_cache_book": steps, "msa_cache_book": random_book(1), "mlp_cache_book": random_book(2)}


def flux_books() -> dict[str, Any]:
    attention = random_book(3, 2)
    double = {"attn": attention, "context_attn": attention, "ff": random_book(4, 2), "context_ff": random_book(5, 2)}
    single = {"attn": random_book(6), "mlp": random_book(7)}
    return {
        "step_cache_book": [False, True, False, False, True, False],
        "transformer_cache_book": {**double, "ip_attn": attention},
        "single_transformer_cache_book": single,
    }


def write(path: Path, books: object) -> Path:
    path.write_text(json.dumps(books, indent=2))
    return path


def load(tmp_path: Path, books: object, sites: list[str] = DIT) -> Schedule:
    return Schedule.from_invardiff(write(tmp_path / "books.json", books), sites=sites)


def test_a_module_takes_the_value_that_the_loop_of_invardiff_has(tmp_path: Path) -> None:
    books = dit_books()
    schedule = load(tmp_path, books)
    cached = {"msa": [-1] * BLOCKS, "mlp": [-1] * BLOCKS}  # the step that computed what is cached
    for step in range(STEPS):
        if books["step_cache_book"][step]:
            assert not schedule.compute[step].any()
            continue
        for kind, part in (("msa", "attn1"), ("mlp", "ff")):
            for block in range(BLOCKS):
                if not books[f"{kind}_cache_book"][step][block]:
                    cached[kind][block] = step
                column = schedule.compute[: step + 1, DIT.index(f"transformer_blocks.{block}.{part}")]
                assert np.flatnonzero(column)[-1] == cached[kind][block], (step, kind, block)
    assert schedule.made_by is not None
    assert schedule.made_by.method == "invardiff"


def test_what_is_void_in_a_reused_step_changes_nothing(tmp_path: Path) -> None:
    books = dit_books()
    schedule = load(tmp_path, books)
    books["msa_cache_book"][2] = [not reused for reused in books["msa_cache_book"][2]]
    assert load(tmp_path, books) == schedule


def test_the_last_block_alone_takes_the_book_of_steps(tmp_path: Path) -> None:
    books = dit_books()
    with pytest.raises(ScheduleError, match="no site matches this"):
        load(tmp_path, books, ["transformer_blocks.2"])
    computed = [not reused for reused in books["step_cache_book"]]
    nothing = np.repeat(~np.array(computed)[:, None], BLOCKS, axis=1).tolist()
    books |= {"msa_cache_book": nothing, "mlp_cache_book": nothing}
    assert load(tmp_path, books, ["transformer_blocks.2"]).compute[:, 0].tolist() == computed


def test_the_books_of_flux(tmp_path: Path) -> None:
    books = flux_books()
    schedule = load(tmp_path, books, FLUX)
    step, computed = 3, dict(zip(FLUX, schedule.compute[3].tolist(), strict=True))
    assert not schedule.compute[1].any()
    double, single = books["transformer_cache_book"], books["single_transformer_cache_book"]
    for block in range(2):
        for part, key in (("attn", "attn"), ("ff", "ff"), ("ff_context", "context_ff")):
            assert computed[f"transformer_blocks.{block}.{part}"] is not double[key][step][block]
    for block in range(BLOCKS):
        for part, key in (("attn", "attn"), ("act_mlp", "mlp")):
            assert computed[f"single_transformer_blocks.{block}.{part}"] is not single[key][step][block]


def test_attention_of_flux_is_reused_if_both_of_its_outputs_are(tmp_path: Path) -> None:
    books = flux_books()
    books["transformer_cache_book"]["context_attn"] = np.zeros((STEPS, 2), dtype=bool).tolist()
    schedule = load(tmp_path, books, FLUX)
    assert schedule.compute[2, FLUX.index("transformer_blocks.0.attn")]


def test_a_projection_of_both_outputs_of_a_block_is_reused_if_both_are(tmp_path: Path) -> None:
    books = flux_books()
    with pytest.raises(ScheduleError, match="pass these two as sites"):
        load(tmp_path, books, JOINED)
    single = books["single_transformer_cache_book"]
    single["mlp"] = single["attn"]
    schedule = load(tmp_path, books, JOINED)
    assert schedule.compute[2, -1] != single["attn"][2][-1]
    schedule.save_invardiff(tmp_path / "out.json")
    again = json.loads((tmp_path / "out.json").read_text())["single_transformer_cache_book"]
    assert again["attn"] == again["mlp"]
    assert Schedule.from_invardiff(tmp_path / "out.json", sites=JOINED) == schedule


@pytest.mark.parametrize(("books", "sites"), [(dit_books(), DIT), (flux_books(), FLUX)], ids=["DiT", "Flux"])
def test_what_is_written_is_what_was_read(tmp_path: Path, books: dict[str, Any], sites: list[str]) -> None:
    schedule = load(tmp_path, books, sites)
    schedule.save_invardiff(tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written.keys() == books.keys()
    assert written["step_cache_book"] == books["step_cache_book"]
    assert Schedule.from_invardiff(tmp_path / "out.json", sites=sites) == schedule


def test_a_kind_without_sites_is_written_as_computed(tmp_path: Path) -> None:
    attention = [site for site in DIT if "attn1" in site]
    Schedule.every(2, steps=4, sites=attention).save_invardiff(tmp_path / "out.json")
    books = json.loads((tmp_path / "out.json").read_text())
    assert books["mlp_cache_book"] == [[step % 2 == 1] * BLOCKS for step in range(4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_cache_book": None}, "step_cache_book: expected a list"),
        ({"step_cache_book": [False, 2]}, "only 0 .* and 1"),
        ({"step_cache_book": [False, True]}, "msa_cache_book: expected one row per step"),
        ({"msa_cache_book": [[False, False], *[[False]] * 5]}, "msa_cache_book: expected rows of one length"),
        ({"mlp_cache_book": [[False] * 2] * STEPS}, "the books have 2 blocks, and 3 sites"),
        ({"attn_cache_book": random_book(8)}, "attn_cache_book: no book of InvarDiff"),
    ],
)
def test_what_is_no_such_file_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as error:
        load(tmp_path, dit_books() | change)
    assert str(error.value).startswith(str(tmp_path / "books.json"))


def test_a_file_without_the_book_of_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="step_cache_book: missing book"):
        load(tmp_path, {"msa_cache_book": random_book(1)})


def test_what_the_books_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="has weights"):
        Schedule.every(2, steps=4, sites=DIT).with_taylor().save_invardiff(tmp_path / "out.json")
    with pytest.raises(ScheduleError, match=r"blocks\.0\.mixer: InvarDiff has no book"):
        Schedule.every(2, steps=4, sites=["blocks.0.mixer"]).save_invardiff(tmp_path / "out.json")
