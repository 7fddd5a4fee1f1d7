"""Plan files whose digest fits and whose contents do not: each is refused when it is loaded, and nothing of it runs.

Every case is a way by which a file made code run, memory be read out of bounds, or a run fail at its first call.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.errors import PlanFileError
from tests.models import stack, stack_call
from tests.planfile.forged import first, forge, nodes
from tests.tiny import random_schedule

STEPS = 4
LINEAR = "aten.linear.default"

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a small model."""
    model, path = stack(), tmp_path_factory.mktemp("plans") / "plan.json"
    compiled = hrt.compile(model, random_schedule(model, STEPS), strict=True)
    for step in range(STEPS):
        compiled(**stack_call(step))
    compiled.save(path)
    return path.read_bytes()


@pytest.fixture
def saved(written: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_bytes(written)
    return path


def plan(document: dict[str, Any]) -> Any:
    return document["plans"][0]


def node_of(kind: str, document: dict[str, Any]) -> Any:
    return next(node for node in nodes(document) if kind in node)


def call(operator: str, *args: Any, **kwargs: Any) -> Change:
    """Put another operator, of these arguments, in the place of the first linear layer."""

    def change(document: dict[str, Any]) -> None:
        node = first(document, LINEAR)
        node.update(call=operator, **({"args": list(args)} if args else {}), **({"kwargs": kwargs} if kwargs else {}))

    return change


def keyword(name: str, value: Any = None) -> Change:
    return lambda document: first(document, "aten.gelu.default").update(kwargs={name: value})


def set_in(kind: str, **values: Any) -> Change:
    return lambda document: node_of(kind, document).update(values)


def layout(operator: str, **values: Any) -> Change:
    return lambda document: first(document, operator)["value"].update(values)


def another_placeholder(document: dict[str, Any]) -> None:
    """A second input of a huge shape, added to the result."""
    number = len(nodes(document))
    place = {"shape": [2, 4, 1000000], "stride": [4000000, 1000000, 1], "dtype": "float32", "device": "cpu"}
    nodes(document).append({"input": 0, "value": place})
    nodes(document).append({"call": "aten.sum.dim_IntList", "args": [{"node": number}, {"list": [-1]}], "value": place})


def swap_operands(document: dict[str, Any]) -> None:
    node = first(document, LINEAR)
    node["args"][0], node["args"][1] = node["args"][1], node["args"][0]


def swap_nodes(document: dict[str, Any]) -> None:
    found = nodes(document)
    at = found.index(first(document, "aten.gelu.default"))
    found[at], found[at + 1] = found[at + 1], found[at]


def offsets(make: Callable[[list[int]], Any]) -> Change:
    def change(document: dict[str, Any]) -> None:
        plan(document)["slot_offsets"] = make(plan(document)["slot_offsets"])

    return change


def other_site_output(document: dict[str, Any]) -> None:
    plan(document)["graph"]["site_outputs"][0] = [0]


def moved_modules(document: dict[str, Any]) -> None:
    first(document, "aten.gelu.default")["modules"] = ["blocks.1.attn"]


def second_plan(document: dict[str, Any]) -> None:
    document["plans"].append(plan(document))


def leaf(**values: Any) -> Change:
    return lambda document: plan(document)["signature"]["leaves"][0].update(values)


def autocast(*pair: Any) -> Change:
    return lambda document: plan(document)["signature"].update(autocast=[list(pair)])


def named_argument(name: str) -> Change:
    return lambda document: plan(document)["signature"].update(tree={"dict": {name: 0, "timestep": 1}})


def of_text(value: str) -> Any:
    return {"list": [value]}


CASES: dict[str, tuple[Change, str]] = {
    "code in a keyword": (
        keyword("**(__import__('os').system('false') and {} or {}), approximate"),
        "aten.gelu.default takes no argument .* by name",
    ),
    "a keyword given by position": (call(LINEAR, {"node": 0}, input=1), "takes no argument 'input' by name"),
    "a keyword of Python": (keyword("lambda"), "takes no argument 'lambda' by name"),
    "kwargs that are a list": (lambda d: first(d, LINEAR).update(kwargs=[]), "kwargs: expected an object"),
    "text that is no argument": (keyword("approximate", "'); import os; ("), "approximate must be of type str, got"),
    "an unknown mode": (keyword("approximate", "nearly"), r"nodes\[\d+\]: RuntimeError: "),
    "a file": (call("aten.from_file.default"), "not among those that a saved plan may hold"),
    "an image": (call("image.read_file.default"), "not the name of an operator of aten or harmonica"),
    "a pool": (call("inductor._alloc_from_pool.default"), "not the name of an operator"),
    "memory by numbers": (call("aten.as_strided.default"), "not among those"),
    "memory of before": (call("aten.empty_like.default"), "not among those"),
    "an index that is trusted": (call("aten._unsafe_index.Tensor"), "not among those"),
    "in place": (call("aten.mul_.Tensor"), "not among those"),
    "an out variant": (call("aten.mul.out"), "not among those"),
    "a number": (call("aten.sym_size.int"), "not among those"),
    "whether equal": (call("aten.equal.default"), "not among those"),
    "random numbers": (call("aten.bernoulli.default"), "not among those"),
    "dropout that is on": (call("aten.dropout.default", {"node": 0}, 0.5, True), "draws random numbers"),
    "statistics that are written": (
        call("aten.batch_norm.default", {"node": 2}, None, None, None, None, True, 0.1, 0.1, False),
        "updates training statistics",
    ),
    "a size that depends on values": (call("aten.nonzero.default", {"node": 0}), "not among those"),
    "no such operator": (call("aten.no_such.default"), "has no operator"),
    "an operator that is no text": (lambda d: first(d, LINEAR).update(call=["aten"]), "call: expected a string"),
    "a class of torch": (call("aten.__class__.default"), "has no operator"),
    "too few arguments": (call(LINEAR, {"node": 0}), "needs the argument 'weight'"),
    "too many arguments": (call(LINEAR, *[{"node": 0}] * 4), "takes 3 arguments by position, got 4"),
    "a list for a tensor": (call(LINEAR, {"list": []}, {"node": 0}), "input must be of type Tensor, got"),
    "a number for a tensor": (call(LINEAR, 3, {"node": 0}), "takes a tensor first"),
    "a number of 300 digits": (call("aten.sum.dim_IntList", {"node": 0}, {"list": [10**300]}), "a whole number"),
    "a node that comes later": (call(LINEAR, {"node": 10**6}, {"node": 0}), "a whole number from 0 to"),
    "a node before all": (call(LINEAR, {"node": -1}, {"node": 0}), "a whole number from 0 to"),
    "an unknown kind of value": (call(LINEAR, {"code": "1"}, {"node": 0}), "expected one of dtype, layout"),
    "a name of torch that is no dtype": (call("aten.to.dtype", {"node": 0}, {"dtype": "load"}), "expected one of"),
    "a part of one tensor": (call("operator.getitem", {"node": 0}, 0), "takes a node of several values"),
    "operands swapped": (swap_operands, r"nodes\[\d+\]: RuntimeError: "),
    "nodes swapped": (swap_nodes, "a whole number from 0 to"),
    "a shape that is believed": (layout(LINEAR, shape=[2, 10**9]), "value: expected float32"),
    "strides that are believed": (layout(LINEAR, stride=[10**9, 1]), "value: expected float32"),
    "a dtype that is believed": (layout(LINEAR, dtype="float64"), "value: expected float32"),
    "a negative stride": (layout(LINEAR, stride=[-8, 1]), "stride.0.: expected a whole number"),
    "fewer strides": (layout(LINEAR, stride=[1]), "stride: expected 2 numbers"),
    "a value of a megabyte of sizes": (layout(LINEAR, shape=[1] * 10**5), "value.stride: expected"),
    "a second placeholder": (another_placeholder, "another node already stands for argument 0|value: expected float32"),
    "a weight that is not there": (set_in("weight", weight="blocks.9.attn.weight"), "name of a tensor of the model"),
    "another weight": (set_in("weight", weight="blocks.0.attn.weight"), "value: expected float32"),
    "a weight by number": (set_in("weight", weight=0), "weight: expected a string"),
    "an argument that is not there": (set_in("input", input=7), "input: expected a whole number from 0 to 1"),
    "another argument": (set_in("input", input=1), "value: expected float32|another node already stands"),
    "a site elsewhere": (other_site_output, "not the outputs of the schedule's sites"),
    "a node of another site": (moved_modules, "not the outputs of the schedule's sites"),
    "modules that are not there": (
        lambda d: first(d, LINEAR).update(modules=["\x1b[31m"]),
        "expected paths of modules of the model",
    ),
    "an offset before the arena": (
        offsets(lambda found: [-64, *found[1:]]),
        "slot_offsets.0.: expected a whole number",
    ),
    "an offset that is not aligned": (offsets(lambda found: [1, *found[1:]]), "not aligned|overlap"),
    "offsets far apart": (offsets(lambda found: [*found[:-1], 2**40]), "slots of .* bytes"),
    "offsets beyond all memory": (offsets(lambda found: [*found[:-1], 2**62]), "slots of .* bytes"),
    "fewer offsets": (offsets(lambda found: found[:-1]), "places for .* slots"),
    "offsets that are true": (offsets(lambda found: [True for _ in found]), "expected a whole number"),
    "another role": (lambda d: plan(d).update(roles=["request", "request"]), "roles: expected"),
    "one role": (lambda d: plan(d).update(roles=["latents"]), "roles: expected"),
    "two plans of a signature": (second_plan, r"plans\[1\]: a second plan"),
    "an argument of another shape": (leaf(shape=[2, 3, 8]), "value: expected float32|not the form"),
    "an argument of huge shape": (leaf(shape=[2**60, 4, 8], stride=[32, 8, 1]), "needs .* bytes, but cpu has only"),
    "an argument of overflowing shape": (leaf(shape=[2**62, 2**62, 8], stride=[0, 0, 0]), "RuntimeError|not the form"),
    "an argument that the model lacks": (named_argument("sample"), "takes no argument 'sample'"),
    "arguments that are no dict": (lambda d: plan(d)["signature"].update(tree={"list": [0, 1]}), "a dict of arguments"),
    "leaves out of order": (
        lambda d: plan(d)["signature"].update(tree={"dict": {"latents": 1, "timestep": 0}}),
        "leaves numbered in order",
    ),
    "a leaf too many": (lambda d: plan(d)["signature"]["leaves"].append({"plain": 1}), "expected 2 values"),
    "autocast elsewhere": (autocast("tpu", {"dtype": "bfloat16"}), "a device and a dtype that autocast has"),
    "autocast to whole numbers": (autocast("cpu", {"dtype": "int8"}), "a device and a dtype that autocast has"),
    "autocast of one word": (autocast("cpu"), "expected a device and a dtype"),
    "more outputs": (lambda d: plan(d)["graph"]["outputs"].append(None), "outputs: expected 1 values"),
    "an output that is a list": (
        lambda d: plan(d)["graph"].update(outputs=[{"list": []}]),
        "a tensor or a plain value",
    ),
    "nodes in an object": (lambda d: plan(d)["graph"].update(nodes={}), "nodes: expected a list"),
    "a node of neither kind": (lambda d: nodes(d).insert(0, {}), "expected the fields call, value"),
    "a node that is a number": (lambda d: nodes(d).insert(0, 5), "expected an object"),
    "an unknown field": (lambda d: nodes(d)[0].update(name="x"), "expected the fields"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_when_it_is_loaded(name: str, saved: Path) -> None:
    change, message = CASES[name]
    forge(saved, change)
    with pytest.raises(PlanFileError, match=message) as raised:
        hrt.load(saved, stack())
    told = str(raised.value)
    assert told.startswith(f"{saved}: ")
    assert told.isprintable()
    assert len(told) < 2000


def test_an_edit_of_meaning_is_noticed(saved: Path) -> None:
    """A row of the schedule and the operands of an addition: both make a plan that is sound, and another one."""

    def another_row(document: dict[str, Any]) -> None:
        rows = document["schedules"][0]["compute"]
        rows[1] = rows[1].translate(str.maketrans("01", "10"))

    def another_operand(document: dict[str, Any]) -> None:
        node = first(document, "aten.add.Tensor")
        node["args"][0] = node["args"][1]

    text = saved.read_text()
    for change in (another_row, another_operand):
        document = json.loads(text)
        change(document)
        saved.write_text(json.dumps(document))
        with pytest.raises(PlanFileError, match=r"damaged or edited: its contents do not match its digest"):
            hrt.load(saved, stack())


def test_layout_of_the_text_is_no_edit(saved: Path) -> None:
    document = json.loads(saved.read_text())
    saved.write_bytes(json.dumps(dict(reversed(document.items())), indent=3).replace("\n", "\r\n").encode())
    hrt.load(saved, stack())


def test_text_of_a_file_is_escaped(saved: Path) -> None:
    forge(saved, lambda document: first(document, LINEAR).update(call="\x1b[2J" + "x" * 10_000))
    with pytest.raises(PlanFileError) as raised:
        hrt.load(saved, stack())
    assert "\x1b" not in str(raised.value)
    assert r"\x1b[2J" in str(raised.value)
    assert len(str(raised.value)) < 500


def test_names_of_a_file_do_not_reach_the_source(saved: Path) -> None:
    """Nodes have no names in a file: what a loaded graph calls them is its own choice."""
    assert not any("name" in node for node in nodes(json.loads(saved.read_text())))
    forge(saved, lambda document: nodes(document)[0].update(name="x): import os; ("))
    with pytest.raises(PlanFileError, match="expected the fields"):
        hrt.load(saved, stack())


def test_a_directory_and_a_path_with_nul(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="cannot be read"):
        hrt.load(tmp_path, stack())
    with pytest.raises(PlanFileError, match="cannot be read"):
        hrt.load("a\x00b", stack())


def test_nothing_is_allocated_before_it_is_checked(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forged constant of a terabyte, of a few bytes of text."""

    def change(document: dict[str, Any]) -> None:
        huge = {"shape": [2**40], "stride": [1], "dtype": "uint8", "device": "cpu"}
        nodes(document).append({"constant": {"data": "AAAA"}, "value": huge})

    forge(saved, change)
    with pytest.raises(PlanFileError, match="a constant of 1099511627776 bytes; at most"):
        hrt.load(saved, stack())


@pytest.mark.parametrize(
    ("constant", "value", "message"),
    [
        ({"data": "AAAA"}, {"shape": [4], "stride": [1], "dtype": "uint8"}, "expected 4 bytes, got 3"),
        ({"data": "A"}, {"shape": [1], "stride": [1], "dtype": "uint8"}, "expected text in base64"),
        ({"data": "Ä"}, {"shape": [1], "stride": [1], "dtype": "uint8"}, "expected text in base64"),
        ({"data": 7}, {"shape": [1], "stride": [1], "dtype": "uint8"}, "expected a string"),
        ({"data": "AgAB"}, {"shape": [3], "stride": [1], "dtype": "bool"}, "expected only the bytes 0 and 1"),
        ({"data": "AAAA"}, {"shape": [3], "stride": [2**30], "dtype": "uint8"}, "a constant of"),
        ({"attribute": "weight"}, {"shape": [1], "stride": [1], "dtype": "uint8"}, "name of a tensor of the model"),
        ({"attribute": "a", "data": "b"}, {"shape": [1], "stride": [1], "dtype": "uint8"}, "expected the fields"),
        ({}, {"shape": [1], "stride": [1], "dtype": "uint8"}, "expected the fields"),
    ],
)
def test_constants(constant: Any, value: dict[str, Any], message: str, saved: Path) -> None:
    forge(saved, lambda document: nodes(document).append({"constant": constant, "value": {**value, "device": "cpu"}}))
    with pytest.raises(PlanFileError, match=message):
        hrt.load(saved, stack())


def test_what_is_refused_leaves_no_trace(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = stack()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forge(saved, CASES["operands swapped"][0])
    with caplog.at_level(logging.INFO, logger="harmonica_rt"), pytest.raises(PlanFileError):
        hrt.load(saved, model)
    assert not [record for record in caplog.records if record.name.startswith("harmonica_rt")]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
