"""Spans of blocks in a captured graph: what leaves one is paired with what it grew from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.capture.captures import captures_of
from harmonica_rt.errors import CaptureError, Obstacle, SiteError
from harmonica_rt.schedule import Schedule

WIDTH, TEXT, IMAGE = 8, 3, 4


class Joint(nn.Module):
    """A block with a stream of text and one of images, which it joins, adds to, and splits again."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([text, image], dim=1)
        both = both + scale * torch.tanh(self.mix(both))
        return both[:, : text.shape[1]], both[:, text.shape[1] :]


class Apart(nn.Module):
    """A block that adds to a part of each stream, and joins it with the rest again."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        first, middle, last = torch.split(image, [1, 1, IMAGE - 2], dim=1)
        rest, narrow = last[..., : WIDTH // 2], last[..., WIDTH // 2 :]
        last = torch.cat([rest, narrow + scale * narrow.tanh()], dim=-1)
        image = torch.cat([torch.cat([first, middle + scale * self.mix(middle)], dim=1), last], dim=1)
        return text + self.mix(text), image + self.mix(image)


class InPlace(nn.Module):
    """A block that adds in place, in fp32, and returns its own type."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        image += self.up(image)
        image = (image.float() + scale * self.down(image)).type_as(image)
        return text, image.clamp(-100, 100)


class Skipping(nn.Module):
    """A block whose output is a product: nothing is left of what entered."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return text, self.linear(image) * scale


Between = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TwoStreams(nn.Module):
    """Blocks over text and images: `latents` [B, 4, 8], `text` [B, 3, 8], `timestep` [B]."""

    def __init__(self, block: type[nn.Module], between: Between | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.between = between

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """Returns [B, 4, 8]."""
        image, scale = self.embed(latents), 1 + timestep[:, None, None]
        for block in self.blocks:
            text, image = block(image, text, scale)
            if self.between is not None:
                text, image = self.between(text, image)
        return image + text.mean(dim=1, keepdim=True)


def model_of(block: type[nn.Module] = Joint, between: Between | None = None) -> TwoStreams:
    torch.manual_seed(0)
    return TwoStreams(block, between).eval()


def call_of(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "latents": torch.randn(2, IMAGE, WIDTH, generator=generator).to(dtype),
        "text": torch.randn(2, TEXT, WIDTH, generator=torch.Generator().manual_seed(99)).to(dtype),
        "timestep": torch.full((2,), 1.0 - step / 10, dtype=dtype),
    }


def captured(model: nn.Module, *sites: str) -> CapturedGraph:
    return capture(model, CallConvention(model).normalise((), call_of(0)), sites)


def assert_parity(model: nn.Module, *sites: str, dtype: torch.dtype = torch.float32) -> None:
    """`plain` equals the reference bit for bit under plain reuse and under weights, and reuses something."""
    schedule = Schedule.from_mask("101001", sites=sites).with_taylor(1)
    kept = captures_of(model)  # one capture serves all lowerings
    calls = [call_of(step, dtype) for step in range(6)]
    report = hrt.verify(model, schedule, calls=calls, lowering="plain")
    assert all(step.same_bits for step in report.steps)
    assert report.trajectory_same_bits
    assert hrt.verify(model, schedule, calls=calls, lowering="fused").ok
    compiled = hrt.compile(model, schedule, lowering="plain", strict=True)
    outputs = [compiled(**call) for call in calls]
    assert not torch.equal(outputs[1], model(**calls[1]))
    del kept


def test_each_stream_is_paired_with_what_entered() -> None:
    graph = captured(model_of(), "blocks[0:4]")
    (outputs,) = graph.site_outputs
    entering = {graph.bases[node].name for node in outputs}
    assert len(outputs) == 2
    assert {graph.cached_value(node).shape for node in outputs} == {(2, TEXT, WIDTH), (2, IMAGE, WIDTH)}
    assert "text" in entering
    assert any(name.startswith("linear") for name in entering)


def test_a_span_has_one_value_per_stream_however_many_blocks_it_has() -> None:
    whole = captured(model_of(), "blocks[0:4]")
    each = captured(model_of(), *(f"blocks[{i}:{i + 1}]" for i in range(4)))
    assert [len(outputs) for outputs in whole.site_outputs] == [2]
    assert [len(outputs) for outputs in each.site_outputs] == [2, 2, 2, 2]


@pytest.mark.parametrize("block", [Joint, Apart, InPlace], ids=["joined and split", "split and joined", "in place"])
@pytest.mark.parametrize("sites", [("blocks[0:4]",), ("blocks[1:3]", "blocks[3:4]"), ("blocks.0", "blocks[2:4]")])
def test_parity(block: type[nn.Module], sites: tuple[str, ...]) -> None:
    if block is InPlace and "blocks.0" in sites:
        sites = sites[1:]  # it returns the text as it is, so the module itself is no site
    assert_parity(model_of(block), *sites)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parity_in_other_dtypes(dtype: torch.dtype) -> None:
    assert_parity(model_of().to(dtype), "blocks[0:4]", dtype=dtype)


def test_what_is_added_between_two_blocks_enters_anew() -> None:
    model = model_of(between=lambda text, image: (text, image + torch.sin(image)))
    graph = captured(model, "blocks[0:4]")
    (outputs,) = graph.site_outputs
    assert len(outputs) == 5  # the image after each block, the text after the last
    assert_parity(model, "blocks[0:4]")


class Collecting(TwoStreams):
    """Reads the outputs of inner blocks again at the end, as skip connections do."""

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        image, scale, seen = self.embed(latents), 1 + timestep[:, None, None], []
        for block in self.blocks:
            text, image = block(image, text, scale)
            seen.append(image)
        return image + seen[1] + text.mean(dim=1, keepdim=True)


def test_values_of_a_span_that_others_read() -> None:
    torch.manual_seed(0)
    model = Collecting(Joint).eval()
    (outputs,) = captured(model, "blocks[0:4]").site_outputs
    assert len(outputs) == 3  # one image more
    assert_parity(model, "blocks[0:4]")


def test_an_output_that_is_no_residual_is_refused_with_its_reason() -> None:
    with pytest.raises(CaptureError, match=r"blocks\[0:4\] gives a value that it did not add to") as raised:
        captured(model_of(Skipping), "blocks[0:4]")
    assert raised.value.failure.obstacle is Obstacle.SPAN


def test_compile_raises_it_and_the_reference_does_as_well() -> None:
    schedule = Schedule.every(2, steps=2, sites=["blocks[1:2]"])
    with pytest.raises(CaptureError, match="no residual"):
        hrt.compile(model_of(Skipping), schedule)(**call_of(0))
    with pytest.raises(SiteError, match="did not add to one that enters"):
        hrt.reference(model_of(Skipping), schedule)(**call_of(0))


def test_the_output_is_what_the_model_returns() -> None:
    graph = captured(model_of(), hrt.OUTPUT)
    assert graph.site_outputs == ((graph.output.args[0][0],),)  # type: ignore[index]
    assert_parity(model_of(), hrt.OUTPUT)


def test_a_reused_output_computes_nothing() -> None:
    model = model_of()
    compiled = hrt.compile(model, Schedule.every(2, steps=4, sites=[hrt.OUTPUT]), strict=True)
    outputs = [compiled(**call_of(step)) for step in range(4)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])
    assert compiled.report().plans[0].theoretical_speedup == 2.0


def test_a_block_in_two_places() -> None:
    model = model_of()
    model.blocks[1] = model.blocks[0]
    assert_parity(model, "blocks[0:2]")
    assert_parity(model, "blocks[0:4]")
