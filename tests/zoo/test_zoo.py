"""Every transformer class that diffusers exports, compiled: equal to the reference, with the CUR asked for.

`make test` compiles one class of each kind (`REPRESENTATIVES`) and finds the sites of every class; `make test-all`
compiles them all.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harmonica_rt import find_sites
from harmonica_rt.errors import CaptureError, Obstacle
from tests.tiers import member
from tests.zoo.entry import model_of
from tests.zoo.run import kinds_of, run, run_level
from tests.zoo.table import NO_DENOISER, REPRESENTATIVES, ZOO, exported

pytestmark = [
    # models of diffusers that call what diffusers is about to rename
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in version 1.0.0:FutureWarning"),
    # Mochi switches autocast off with a dtype that no CPU has it for
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
]

WORKS = [name for name, entry in ZOO.items() if entry.failure is None]
SOME_OR_ALL = [
    pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.exhaustive, id=name) for name in WORKS
]
# what no plan file holds: plans for some values of the request, regions with autocast of their own, sizes of values
UNSAVED = "reads values of its request|nested graphs|a graph that calls|shape \\(u0"
FAILS = [name for name in ZOO if name not in WORKS]


@pytest.mark.parametrize("name", SOME_OR_ALL)
def test_compiled_equals_the_reference(name: str) -> None:
    outcome = run(name, ZOO[name])
    assert outcome.plain.tolerance == "exact"
    assert all(step.same_bits for step in outcome.plain.steps)
    assert outcome.plain.trajectory_same_bits
    assert 0.3 < outcome.schedule.cur < 0.6
    assert outcome.fused.last_cur == pytest.approx(outcome.schedule.cur, abs=1e-9)
    assert outcome.fused.last_catch_ups == ()
    assert outcome.fused.fallbacks == ()
    assert outcome.fused.plans[0].theoretical_speedup > 1
    assert outcome.unsaved is None or re.search(UNSAVED, outcome.unsaved)


@pytest.mark.parametrize("level", ["span", "output"])
@pytest.mark.parametrize(
    "name", [member(name, id=name, always=name == "CogVideoXTransformer3DModel") for name in WORKS]
)
def test_spans_and_the_output_equal_the_reference(name: str, level: str) -> None:
    if level == "span" and ZOO[name].no_span is not None:
        with pytest.raises(CaptureError) as raised:
            run_level(name, ZOO[name], level)
        assert raised.value.failure.obstacle is Obstacle.SPAN
        return
    plain = run_level(name, ZOO[name], level)
    assert all(step.same_bits for step in plain.steps)
    assert plain.trajectory_same_bits


@pytest.mark.parametrize("name", FAILS)
def test_exceptions_fail_as_they_say(name: str) -> None:
    expected = ZOO[name].failure
    assert expected is not None
    with pytest.raises(expected.error, match=expected.message) as raised:
        run(name, ZOO[name])
    if isinstance(raised.value, CaptureError):
        assert raised.value.failure.obstacle is expected.obstacle


@pytest.fixture
def page() -> str:
    return (Path(__file__).parents[2] / "docs" / "zoo.md").read_text()


def test_the_page_lists_what_the_table_holds(page: str) -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (yes|no)", page, re.MULTILINE))
    assert listed == {name: "yes" if entry.failure is None else "no" for name, entry in ZOO.items()}
    spans = {name: entry.no_span or "yes" for name, entry in ZOO.items() if entry.failure is None}
    assert dict(re.findall(r"^\| `(\w+)` \|[^|]*\| yes \| ([^|]*) \|", page, re.MULTILINE)) == spans


def test_the_sites_of_every_class_are_those_that_the_page_lists(page: str) -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \| yes", page, re.MULTILINE))
    found = {name: kinds_of(find_sites(model_of(name, ZOO[name].config))) for name in WORKS}
    assert {name: ", ".join(f"`{kind}`" for kind in kinds) for name, kinds in found.items()} == listed


def test_the_table_covers_what_diffusers_exports() -> None:
    assert sorted([*ZOO, *NO_DENOISER]) == sorted(exported())
