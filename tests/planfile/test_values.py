"""Values of plan files: what is written is read again, on the devices of a model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from harmonica_rt.errors import PlanFileError
from harmonica_rt.graph.layout_inference import Layout
from harmonica_rt.planfile.values import Devices, decode_layout, decode_value, encode_layout, encode_value


class On:
    """In the place of a tensor on a device that this machine lacks."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def devices(*names: str) -> Devices:
    return Devices([On(name) for name in names])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -(2**63) + 1, 0.1, float("inf"), float("-inf"), "tanh", [1, (2.0, None)], ()),
        *(torch.bfloat16, torch.strided, torch.channels_last, torch.device("cpu")),
    ],
    ids=str,
)
def test_a_value_comes_back(value: Any) -> None:
    here = devices("cpu")
    got = decode_value(json.loads(json.dumps(encode_value(value, here))), here, "here")
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "value", [2**63, 1j, b"", {1}, object(), torch.per_tensor_affine], ids=lambda value: type(value).__name__
)
def test_a_value_without_a_form_is_not_written(value: Any) -> None:
    with pytest.raises(PlanFileError, match="cannot be saved"):
        encode_value(value, devices("cpu"))


@pytest.mark.parametrize(("saved_on", "loaded_on"), [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"), ("cuda:3", "cuda:3")])
def test_a_device_moves_with_the_model(saved_on: str, loaded_on: str) -> None:
    there, here = devices(saved_on, "cpu"), devices(loaded_on)
    assert decode_value(encode_value(torch.device(saved_on), there), here, "x") == torch.device(loaded_on)
    layout = Layout((2, 3), (3, 1), torch.float16, torch.device(saved_on))
    assert decode_layout(encode_layout(layout, there), here, "x") == layout._replace(device=torch.device(loaded_on))
    for cpu in ("cpu", "cpu:0"):  # stays where it is
        assert decode_value(encode_value(torch.device(cpu), there), here, "x") == torch.device("cpu")


def test_the_current_device_stays_the_current_one() -> None:
    there, here = devices("cuda:1"), devices("cuda:2")
    assert decode_value(encode_value(torch.device("cuda"), there), here, "x") == torch.device("cuda")


def test_a_plan_over_several_devices_is_refused() -> None:
    with pytest.raises(PlanFileError, match=r"several devices \(cuda:0, cuda:1\)"):
        devices("cuda:0", "cpu", "cuda:1")
    with pytest.raises(PlanFileError, match="values on cuda:1, not a device of the model"):
        encode_value(torch.device("cuda:1"), devices("cuda:0"))
    with pytest.raises(PlanFileError, match="values on cuda:0, not a device of the model"):
        encode_value(torch.device("cuda:0"), devices("cpu"))


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "", "mps", None, 0, ["cpu"]])
def test_a_device_that_the_model_does_not_lie_on(name: Any) -> None:
    with pytest.raises(PlanFileError, match=r"x: expected a device of the model \(cpu\), got"):
        decode_value({"device": name}, devices("cpu"), "x")


@pytest.mark.parametrize("value", [{}, {"a": 1, "b": 2}, {"node": 0}, {"list": 1}, {"float": "1"}, [], 2**63, {"": []}])
def test_what_was_not_written_is_refused(value: Any) -> None:
    with pytest.raises(PlanFileError, match=r"^x: expected "):
        decode_value(value, devices("cpu"), "x")
