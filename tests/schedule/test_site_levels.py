"""Sites of every size: sub-layers, blocks, spans of blocks, and the output."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import harmonica_rt as hrt
from harmonica_rt.errors import ArgumentError, ScheduleError, SiteError
from harmonica_rt.schedule import Schedule, find_sites
from harmonica_rt.schedule.panels import panels_of
from harmonica_rt.schedule.sites import check_sites
from tests.models import attending, stack, stack_call

MODEL = attending(depth=3)


def test_levels() -> None:
    assert find_sites(MODEL, level="sublayer") == find_sites(MODEL)
    assert find_sites(MODEL, level="block") == ["blocks[0:1]", "blocks[1:2]", "blocks[2:3]"]
    assert find_sites(MODEL, level="span") == ["blocks[0:3]"]
    assert find_sites(MODEL, level="output") == [hrt.OUTPUT]


def test_spans_and_the_output_by_pattern() -> None:
    assert find_sites(MODEL, ["blocks.2.attn", "blocks[0:2]"]) == ["blocks[0:2]", "blocks.2.attn"]
    assert find_sites(MODEL, ["*[1:3]"]) == ["blocks[1:3]"]
    assert find_sites(MODEL, [hrt.OUTPUT]) == [hrt.OUTPUT]


def test_a_block_in_two_places_is_one_site() -> None:
    model = attending(depth=3)
    model.blocks[2] = model.blocks[0]
    assert find_sites(model, level="block") == ["blocks[0:1]", "blocks[1:2]"]


def test_a_list_inside_a_block_is_a_part_of_that_block() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(attending(depth=2) for _ in range(2))

    assert find_sites(Wrapped(), level="span") == ["layers[0:2]"]


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (["blocks[0:2]", "blocks[1:3]"], r"blocks\[0:2\] and blocks\[1:3\] overlap in blocks\.1"),
        (["blocks[0:2]", "blocks.1.attn"], r"blocks\.1\.attn lies inside site blocks\[0:2\]"),
        (["blocks.1.attn", "blocks[0:2]"], r"blocks\.1\.attn lies inside site blocks\[0:2\]"),
        (["blocks.0", "blocks[0:1]"], r"overlap in blocks\.0"),
        ([hrt.OUTPUT, "blocks.0"], "blocks.0 is a part of what the site 'output' replaces"),
        (["blocks[2:2]"], "holds no block"),
        (["blocks[3:2]"], "holds no block"),
        (["blocks[01:2]"], "without leading zeros"),
        (["blocks[:2]"], "is no span of blocks"),
        (["blocks[4]"], r"transformer_blocks\[4:5\] block 4 alone"),
        (["blocks[-2:2]"], "is no span of blocks"),
        (["blocks[0:2].attn[0:1]"], "is no span of blocks"),
        (["blocks[0:99999999]"], "is no span of blocks"),
    ],
)
def test_a_schedule_refuses_sites_that_overlap_or_are_none(sites: list[str], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.every(2, steps=4, sites=sites)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("blocks[0:4]", "blocks has 3 blocks"),
        ("layers[0:1]", "has no module layers"),
        ("embed[0:1]", "embed is a Linear; a span takes blocks of an nn.ModuleList"),
    ],
)
def test_a_model_without_the_span_is_named(site: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        check_sites(stack(), [site])
    with pytest.raises(ScheduleError, match=message):
        hrt.compile(stack(), Schedule.every(2, steps=4, sites=[site]))


def test_a_module_called_output_is_not_mistaken() -> None:
    model = stack()
    model.output = nn.Linear(8, 8)
    with pytest.raises(SiteError, match="has a module called 'output'"):
        check_sites(model, [hrt.OUTPUT])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"level": "blocks"}, "level is one of 'sublayer'"), ({"level": "span", "patterns": ["**"]}, "not both")],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        find_sites(MODEL, **arguments)  # type: ignore[arg-type]


def test_a_mask_names_spans_and_their_lists() -> None:
    sites = ["blocks[0:2]", "blocks[2:3]"]
    by_name = Schedule.from_mask({"blocks[0:2]": "10", "blocks[2:3]": "11"}, sites=sites)
    assert by_name.compute.tolist() == [[True, True], [False, True]]
    assert Schedule.from_mask({"blocks": "10"}, sites=sites).compute.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("sites", [["blocks[0:2]", "blocks.2.attn"], [hrt.OUTPUT]], ids=["span", "output"])
def test_files_are_of_version_2(tmp_path: Path, sites: list[str]) -> None:
    path = tmp_path / "schedule.json"
    schedule = Schedule.every(2, steps=4, sites=sites)
    schedule.save(path)
    assert '"version": 2' in path.read_text()
    assert Schedule.load(path) == schedule
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(ScheduleError, match="version 1 has no spans and no output"):
        Schedule.load(path)


def test_the_output_is_a_kind_of_its_own() -> None:
    assert Schedule.every(2, steps=4, sites=[hrt.OUTPUT]).cur_per_kind() == {"output": 0.5}


@pytest.mark.parametrize(
    ("sites", "labels", "axis"),
    [
        (["blocks[0:2]", "blocks[2:3]", "blocks[3:4]", "blocks[4:5]"], ("0:2", "2:3", "3:4", "4:5"), "blocks"),
        (["a.blocks[0:1]", "a.blocks[1:2]", "b.blocks[0:1]"], ("a.blocks[0:1]", "a.blocks[1:2]", "b.blocks[0:1]"), ""),
        ([hrt.OUTPUT], ("output",), ""),
    ],
)
def test_pictures_name_blocks(sites: list[str], labels: tuple[str, ...], axis: str) -> None:
    (panel,) = panels_of(sites)
    assert (panel.labels, panel.axis) == (labels, axis)
    assert Schedule.every(2, steps=4, sites=sites).plot() is not None


def test_smoothcache_has_no_spans(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"outputs of modules, not 'blocks\[0:2\]'"):
        Schedule.every(2, steps=4, sites=["blocks[0:2]"]).save_smoothcache(tmp_path / "schedule.json")


def test_sub_layers_beside_a_span() -> None:
    schedule = Schedule.random(0.5, steps=4, sites=["blocks[0:2]", "blocks.2.attn", "blocks.2.mlp"], seed=1)
    calls = [stack_call(step, width=16) for step in range(4)]
    report = hrt.verify(MODEL, schedule, calls=calls, lowering="plain")
    assert all(step.same_bits for step in report.steps)
