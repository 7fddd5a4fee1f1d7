from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harmonica_rt.call.call import CallConvention
from harmonica_rt.errors import SignatureError


class Denoiser(nn.Module):
    def forward(self, sample: Any, timestep: Any, cond: Any = None, extra: Any = None, return_dict: bool = True) -> Any:
        return sample


@pytest.fixture
def convention() -> CallConvention:
    return CallConvention(Denoiser())


def test_position_and_name_give_the_same_signature(convention: CallConvention) -> None:
    x, t = torch.randn(2, 3), torch.tensor([1.0])
    by_position = convention.normalise((x, t), {"return_dict": False})
    by_name = convention.normalise((), {"return_dict": False, "timestep": t, "sample": x})
    assert by_position.signature == by_name.signature
    assert hash(by_position.signature) == hash(by_name.signature)
    assert list(by_name.kwargs) == ["sample", "timestep", "return_dict"]


@pytest.mark.parametrize(
    "other",
    [
        {"sample": torch.zeros(2, 4)},
        {"sample": torch.zeros(2, 3, dtype=torch.float16)},
        {"sample": torch.zeros(3, 2).T},
        {"return_dict": True},
        {"return_dict": 0},
        {"cond": torch.zeros(1)},
        {"extra": {"a": None}},
    ],
    ids=["shape", "dtype", "strides", "plain value", "0 is not False", "one more", "nested"],
)
def test_calls_that_differ_have_different_signatures(convention: CallConvention, other: dict[str, Any]) -> None:
    base = {"sample": torch.zeros(2, 3), "timestep": torch.zeros(1), "return_dict": False}
    assert convention.normalise((), base).signature != convention.normalise((), {**base, **other}).signature


def test_strides_of_dimensions_of_one_do_not_count(convention: CallConvention) -> None:
    a = convention.normalise((torch.zeros(1, 3), torch.zeros(1)), {})
    b = convention.normalise((torch.zeros(3, 1).T, torch.zeros(1)), {})
    assert a.signature == b.signature


def test_paths_name_nested_tensors(convention: CallConvention) -> None:
    call = convention.normalise((torch.zeros(1), torch.zeros(1)), {"extra": {"a": torch.zeros(2), "b": [None]}})
    assert call.paths == ("sample", "timestep", "extra.a", "extra.b.0")
    assert call.tensors()["extra.a"].shape == (2,)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1, 2, 3, 4, 5, 6), {}, "at most 5 positional arguments, got 6"),
        ((1,), {"sample": 1, "timestep": 1}, "'sample' twice"),
        ((1, 2), {"smaple": 1}, "takes no argument 'smaple'"),
        ((1,), {}, "needs the argument 'timestep'"),
        ((object(), 2), {}, "object of type object"),
    ],
    ids=["too many", "twice", "unknown", "missing", "opaque"],
)
def test_bad_calls_are_refused(
    convention: CallConvention, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(SignatureError, match=message):
        convention.normalise(args, kwargs)


class Wrapper(nn.Module):
    """Takes anything, and does what with it?"""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.other = [*inner, None, None][:2]

    def forward(self, *args: object, **kwargs: object) -> object:
        return args, kwargs


@pytest.mark.parametrize("inner", [(), (nn.Sequential(),), (nn.ModuleList(),), (Denoiser(), Denoiser())])
def test_positions_without_names_are_refused_with_what_to_do(inner: tuple[nn.Module, ...]) -> None:
    convention = CallConvention(Wrapper(*inner))
    with pytest.raises(SignatureError, match=r"forward of Wrapper takes \*args.*Pass arguments by name.*inside"):
        convention.normalise((torch.zeros(1),), {})
    assert convention.normalise((), {"x": torch.zeros(1)}).paths == ("x",)


class ByPosition(nn.Module):
    """Takes no names, so what comes must not be given names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()

    def forward(self, *args: object) -> object:
        return self.inner(*args)


def test_a_wrapper_that_takes_no_names_is_given_none() -> None:
    with pytest.raises(SignatureError, match=r"forward of ByPosition takes \*args"):
        CallConvention(ByPosition()).normalise((torch.zeros(1),), {})


@pytest.mark.parametrize("model", [Wrapper(Denoiser()), Wrapper(Wrapper(Denoiser()))])
def test_a_wrapper_takes_the_arguments_of_its_model(model: nn.Module) -> None:
    x, t = torch.randn(2, 3), torch.tensor([1.0])
    call = CallConvention(model).normalise((x, t), {})
    assert call.signature == CallConvention(Denoiser()).normalise((x, t), {}).signature
    assert list(call.kwargs) == ["sample", "timestep"]
