from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonica_rt.indices import SiteIndex, SiteOutput, StepIndex
from harmonica_rt.plan.slots import ALIGNMENT, SlotTable, Value, most_alive, place

CPU = torch.device("cpu")


def value(site: int, first: int, last: int, elements: int = 16) -> Value:
    output = SiteOutput(SiteIndex(site), 0)
    return Value(output, StepIndex(first), StepIndex(last), (elements,), (1,), torch.float32, CPU)


def overlaps(table: SlotTable) -> list[tuple[int, int]]:
    """Pairs of slots alive in one step that share bytes."""
    found = []
    for a in table.slots:
        for b in table.slots:
            together = a.value.first <= b.value.last and b.value.first <= a.value.last
            apart = a.offset + a.value.size <= b.offset or b.offset + b.value.size <= a.offset
            if a.id < b.id and together and not apart:
                found.append((a.id, b.id))
    return found


LIFETIMES = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 6), st.sampled_from([16, 16, 48, 100])), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LIFETIMES)
def test_slots_alive_at_once_never_overlap(lives: list[tuple[int, int, int]]) -> None:
    values = [value(i % 7, first, first + length, size) for i, (first, length, size) in enumerate(lives)]
    table = place(values)
    assert overlaps(table) == []
    assert all(slot.offset % ALIGNMENT == 0 for slot in table.slots)
    assert table.arena_bytes[CPU] >= table.lower_bound[CPU] == most_alive(values)
    assert table.arena_bytes[CPU] <= sum(v.size for v in values)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LIFETIMES)
def test_slots_of_one_size_take_no_more_than_the_bound(lives: list[tuple[int, int, int]]) -> None:
    table = place([value(i % 7, first, first + length) for i, (first, length, _) in enumerate(lives)])
    assert table.arena_bytes == table.lower_bound


def test_a_slot_read_in_a_step_is_not_written_in_that_step() -> None:
    touching = place([value(0, 0, 2), value(1, 2, 4)])
    assert touching.slots[0].offset != touching.slots[1].offset
    apart = place([value(0, 0, 2), value(1, 3, 4)])
    assert apart.slots[0].offset == apart.slots[1].offset


def test_a_site_goes_back_to_the_place_it_had() -> None:
    table = place([value(0, 0, 1), value(1, 0, 4), value(1, 5, 6), value(0, 5, 6)])
    assert table.slots[1].offset == table.slots[2].offset
    assert table.slots[0].offset == table.slots[3].offset


def test_gaps_between_strides_take_memory_and_expanded_dimensions_do_not() -> None:
    output = SiteOutput(SiteIndex(0), 0)
    gapped = Value(output, StepIndex(0), StepIndex(1), (2, 4), (10, 1), torch.float32, CPU)
    expanded = Value(output, StepIndex(0), StepIndex(1), (100, 4), (0, 1), torch.bfloat16, CPU)
    empty = Value(output, StepIndex(0), StepIndex(1), (0, 4), (4, 1), torch.float32, CPU)
    assert (gapped.extent, expanded.extent, empty.extent) == (14 * 4, 4 * 2, 0)
