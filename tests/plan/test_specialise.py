from __future__ import annotations

import pytest
import torch

from harmonica_rt import find_sites
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.errors import InvariantError
from harmonica_rt.indices import PastOutput, SiteIndex, SiteOutput
from harmonica_rt.plan.specialise import Pattern, specialise
from harmonica_rt.plan.step_graph import check_step_graph
from tests.models import stack, stack_call

MODEL = stack(depth=1)


@pytest.fixture(scope="module")
def captured() -> CapturedGraph:
    return capture(MODEL, CallConvention(MODEL).normalise((), stack_call(0)), find_sites(MODEL))


def pattern(reuse: set[int] | None = None, store: set[int] | None = None) -> Pattern:
    return Pattern(frozenset(map(SiteIndex, reuse or ())), frozenset(SiteOutput(SiteIndex(i), 0) for i in store or ()))


def test_reads_and_stores_are_placeholders_and_outputs(captured: CapturedGraph) -> None:
    step = specialise(captured, pattern(reuse={0}, store={1}))
    assert [node.name for node in step.read_nodes] == ["slot_blocks_0_attn_0"]
    assert step.reads == (PastOutput(SiteOutput(SiteIndex(0), 0), 0),)
    assert step.stores == (SiteOutput(SiteIndex(1), 0),)
    assert [tuple(node.meta["val"].shape) for node in step.stored_nodes] == [(2, 4, 8)]


def test_no_node_is_shared_with_the_captured_graph(captured: CapturedGraph) -> None:
    before = len(captured.graph.nodes)
    step = specialise(captured, pattern(reuse={0, 1}))
    assert not set(step.graph.nodes) & set(captured.graph.nodes)
    assert len(captured.graph.nodes) == before


def test_a_site_both_reused_and_stored_is_refused(captured: CapturedGraph) -> None:
    with pytest.raises(InvariantError, match="reused and stored in one step"):
        specialise(captured, pattern(reuse={0}, store={0}))


def test_dead_nodes_are_noticed(captured: CapturedGraph) -> None:
    step = specialise(captured, pattern())
    node = next(node for node in step.graph.nodes if node.op == "call_function")
    with step.graph.inserting_after(node):
        step.graph.call_function(torch.ops.aten.relu.default, (node,))
    with pytest.raises(InvariantError, match="feeds nothing"):
        check_step_graph(step)
