"""Models that read values of their request while they run: lengths in masks, flags, lists."""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import harmonica_rt as hrt
from harmonica_rt.call.call import Call, CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.errors import CaptureError, Obstacle, PlanFileError
from tests.models import SITES, Block, Stack

STEPS = 4


class Reader(Stack):
    """A `Stack` whose latents get a mean over as much of the prompt as `read` says: `prompt` [B, L, D]."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor, mask: torch.Tensor) -> Any:
        """Returns [B, N, D]."""
        if mask.sum() > 100:  # tracing stops here, whatever it makes of the rest
            latents = -latents
        return super().forward(latents + self.read(prompt, mask).mean(dim=-2, keepdim=True), timestep)

    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """A part of the prompt: [B, L, D] or [L, D]."""
        raise NotImplementedError("each kind of reader says how it reads")


class Item(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return prompt[:, : mask.sum(dim=1).max().item()]


class Length(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return prompt[:, : mask.sum(dim=1).max()]


class List(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([row[:length] for row, length in zip(prompt, mask.sum(dim=1).tolist(), strict=True)])


class Array(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return prompt[:, : int(mask.sum(dim=1).numpy().max())]


class Flag(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return -prompt if torch.all(mask == 1) else prompt


class Mask(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return prompt[mask.bool()]


class Places(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, columns = mask.nonzero(as_tuple=True)
        return prompt[rows, columns] + torch.stack(torch.where(mask), 1).sum() + mask.nonzero().sum()


class Repeated(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return prompt.repeat_interleave(mask[0] + 1, dim=1)


class Written(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(prompt)
        kept[mask.bool()] = prompt[mask.bool()] * 2
        return kept


class Filled(Reader):
    """Reads what it writes, before and after."""

    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = torch.zeros(2, dtype=torch.long)
        lengths[0] = mask[0].sum()
        first = int(lengths.sum())
        lengths.add_(1)
        lengths[1:].copy_(lengths[:1])
        return prompt[:, : first + 1] * int(lengths.sum())


class Changed(Reader):
    """Changes the array that it was given."""

    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(dim=1).numpy()
        lengths += 2  # 5 where the mask says 3: were that noted down, a request of 5 would get this graph
        return prompt[:, : int(lengths.max()) - 2]


class Autocast(Reader):
    """Reads products made in fp32 and in bf16: 3.012 and 3.03125 for a length of 3."""

    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        exact = (mask.float() * 1.004) @ torch.ones(5, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = (mask.float() * 1.004) @ torch.ones(5, 1)
            scale = float(exact.max()) + float(rough.max())
        return prompt * scale


class Where(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        (places,) = torch.where(mask[0])
        return prompt[:, places.tolist()]


class Held(Reader):
    """Reads a tensor that it holds, and one that it makes of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(3)

    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        counts = torch.tensor([1, 2])
        counts[0] = mask[0].sum()
        return prompt[:, : int(self.table.max())] * int(counts.sum())


READERS = [Item, Length, List, Array, Flag, Mask, Places, Repeated, Written, Filled, Changed, Autocast, Where, Held]


def reader(kind: type[Reader]) -> Reader:
    torch.manual_seed(0)
    return kind().eval()


def schedule(model: nn.Module) -> hrt.Schedule:
    return hrt.Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, SITES))


def call(step: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    mask = (torch.arange(5) < length).long().repeat(2, 1)
    later = torch.Generator().manual_seed(step)
    return {
        "latents": torch.randn(2, 4, 8, generator=later),
        "timestep": torch.full((2,), 1.0 - step / 10),
        "prompt": torch.randn(2, 5, 8, generator=generator),
        "mask": mask,
    }


def run(model: Any, lengths: list[int]) -> list[torch.Tensor]:
    return [model(**call(step, length)) for step, length in enumerate(lengths)]


@pytest.mark.parametrize("kind", READERS)
def test_every_request_gets_the_graph_of_its_values(kind: type[Reader]) -> None:
    model = reader(kind)
    compiled = hrt.compile(model, schedule(model), lowering="plain", strict=True)
    for length in (3, 5, 3):
        truth = hrt.reference(model, schedule(model))
        compiled.reset()
        for got, expected in zip(run(compiled, [length] * STEPS), run(truth, [length] * STEPS), strict=True):
            assert torch.equal(got, expected)
    assert len(compiled.report().plans) == 2


def test_what_is_read_is_known_without_a_run_of_the_model(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, logged = reader(Item), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", logged.append)
    monkeypatch.setattr(logging.getLogger("torch.fx.experimental.symbolic_shapes"), "handlers", [handler])
    with mock.patch.object(Item, "read", autospec=True, side_effect=Item.read) as read:
        capture(model, _normal(model, 3), schedule(model).sites)
    assert [type(each.args[2]) for each in read.call_args_list] == [FakeTensor]
    assert capfd.readouterr() == ("", "")
    assert not [record for record in logged if record.levelno >= logging.WARNING]


def test_a_request_that_changes_in_mid_run_changes_the_graph() -> None:
    model = reader(Item)
    compiled = hrt.compile(model, schedule(model), lowering="plain", strict=True)
    got = run(compiled, [3, 3, 5, 5])
    assert compiled.report().last_catch_ups == ()
    compiled.reset()
    again = run(compiled, [3, 5, 5, 3])
    assert compiled.report().last_catch_ups == (1, 3)
    for outputs, lengths in ((got, [3, 3, 5, 5]), (again, [3, 5, 5, 3])):
        for step in (0, 2):  # computed in full, whatever the request
            assert torch.equal(outputs[step], model(**call(step, lengths[step])))
    assert torch.equal(again[1], model(**call(1, 5)))
    assert torch.equal(again[3], model(**call(3, 3)))


class Stops(Reader):
    """Reads a weight for requests of length 3: there is no plan for those."""

    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return prompt * float(self.embed.weight.sum()) if int(mask.sum(dim=1).max()) == 3 else prompt


def test_a_plan_that_holds_is_used_whatever_else_cannot_be_captured() -> None:
    model = reader(Stops)
    compiled = hrt.compile(model, schedule(model), lowering="plain")
    for length in (2, 3, 2):
        truth = hrt.reference(model, schedule(model))
        compiled.reset()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = run(compiled, [length] * STEPS)
        assert [one.category for one in caught] == ([hrt.FallbackWarning] if length == 3 else [])
        assert all(map(torch.equal, got, run(truth, [length] * STEPS)))
    assert len(compiled.plans) == 1
    assert compiled.engine.stream_for(_normal(model, 2))[1] is not None  # by the plan
    assert compiled.engine.stream_for(_normal(model, 3))[1] is None  # eagerly


def _normal(model: nn.Module, length: int) -> Call:
    return CallConvention(model).normalise((), call(0, length))


def test_requests_that_take_turns_share_their_streams() -> None:
    model = reader(Item)
    steps = 8
    plan = hrt.Schedule.every(2, steps=steps, sites=hrt.find_sites(model, SITES))
    compiled = hrt.compile(model, plan, lowering="plain", strict=True)
    for step in range(steps):
        output = compiled(**call(step, 3 + step % 2))
        assert torch.equal(output, model(**call(step, 3 + step % 2)))  # each change computes in full
    assert [runtime.arenas.lent for runtime in compiled.plans.values()] == [1, 1]


def test_fused_works_for_models_that_read_request_values() -> None:
    model = reader(List)
    calls = [call(step, 3) for step in range(STEPS)]
    assert hrt.verify(model, schedule(model), calls=calls, lowering="fused").ok


def test_a_plan_for_values_of_one_request_is_not_saved(tmp_path: Path) -> None:
    model = reader(Item)
    compiled = hrt.compile(model, schedule(model), strict=True)
    compiled(**call(0, 3))
    with pytest.raises(PlanFileError, match="reads values of its request"):
        compiled.save(tmp_path / "plan.json")


class ReadsLatents(Stack):
    """Asks for the sign of its latents."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        return super().forward(-latents if latents.sum() < 0 else latents, timestep)


class Overwrites(Reader):
    def read(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return prompt * mask.mul_(2).sum().item()


def test_a_model_that_writes_to_its_request_is_refused_without_a_run() -> None:
    model, given = reader(Overwrites), call(0, 3)
    compiled = hrt.compile(model, schedule(model), strict=True)
    with pytest.raises(CaptureError, match="it writes to mask"):
        compiled(**given)
    assert torch.equal(given["mask"], call(0, 3)["mask"])


def test_capturing_keeps_nothing_of_the_request_alive() -> None:
    model, given = reader(Written), call(0, 3)
    sites = schedule(model).sites
    capture(model, _normal(model, 3), sites)  # torch keeps the frames of its first imports
    latents = weakref.ref(given["latents"])
    gc.disable()
    try:
        capture(model, CallConvention(model).normalise((), given), sites)
        given.clear()
        assert latents() is None
    finally:
        gc.enable()


def test_what_is_read_of_the_latents_is_no_static_plan() -> None:
    model = ReadsLatents().eval()
    compiled = hrt.compile(model, schedule(model), strict=True)
    with pytest.raises(CaptureError, match="reads a value that depends on latents") as raised:
        compiled(latents=torch.ones(2, 4, 8), timestep=torch.ones(2))
    assert raised.value.failure.obstacle is Obstacle.EXPORT


class Table:
    """Makes its table when it is first asked for."""

    def __init__(self) -> None:
        self.table: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(8).float()
        return self.table


class Lazy(nn.Module):
    """Blocks that make tables at their first call, in the module and in an object that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.own: torch.Tensor | None = None
        self.held = Table()

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """`latents` [B, N, 8], `timestep` [B]."""
        if self.own is None:
            self.own = torch.arange(8).float() / 8
        for block in self.blocks:
            latents = block(latents + self.own + self.held(), timestep[:, None, None])
        return latents


def test_tracing_leaves_no_tensors_without_values_in_the_model() -> None:
    model = Lazy().eval()
    sites = schedule(model)
    calls = [{"latents": torch.randn(1, 3, 8), "timestep": torch.full((1,), 1.0 - step)} for step in range(STEPS)]
    compiled = hrt.compile(model, sites, lowering="plain", strict=True)
    got = [compiled(**each) for each in calls]
    assert type(model.own) is type(model.held.table) is torch.Tensor
    truth = hrt.reference(model, sites)
    assert all(torch.equal(a, truth(**each)) for a, each in zip(got, calls, strict=True))
