"""Schedules to compare with: SmoothCache by its definition, and all at the speed-up that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from harmonica_rt import Schedule, find_sites
from harmonica_rt.errors import ScheduleMismatchError
from harmonica_training.baselines import SmoothCacheErrors, calibrate, fewer_steps, fora, random_at
from harmonica_training.baselines.rules import nearest
from harmonica_training.cached_forward import CachedForward
from harmonica_training.costs import SiteCosts, count_costs
from harmonica_training.denoising_loop import DenoisingLoop
from harmonica_training.errors import TrainingError
from tests import tiny

SITES = ("blocks.0.attn", "blocks.0.ff", "blocks.1.attn", "blocks.1.ff")
NAN = float("nan")


def generators(count: int = 1, seed: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def additive_costs(sites: Sequence[str] = SITES) -> Any:
    """Sites of unequal cost that add up to 80 % of the model."""
    alone = np.linspace(1, 3, len(sites))
    alone *= 0.8 / alone.sum()
    return SimpleNamespace(sites=tuple(sites), speedup=lambda mask: float(1 / (1 - (~mask * alone).sum() / len(mask))))


def drifting(rates: Sequence[float], sites: Sequence[str], lookahead: int = 3) -> SmoothCacheErrors:
    """Errors that are the sums of what changes from step to step, `rates`, scaled by the site's number."""
    position = np.concatenate([[0.0], np.cumsum(rates)])
    errors = np.full((lookahead, len(position), len(sites)), np.nan)
    for j in range(1, lookahead + 1):
        errors[j - 1, j:] = (position[j:] - position[:-j])[:, None] * np.arange(1, len(sites) + 1)
    return SmoothCacheErrors(errors, tuple(sites))


def rows(schedule: Schedule, site: int = 0) -> str:
    """A site's steps, 1 where it computes."""
    return "".join("01"[int(entry)] for entry in schedule.compute[:, site])


def calibrated(name: str, steps: int = 5, **options: Any) -> tuple[DenoisingLoop, SmoothCacheErrors, SiteCosts]:
    family = tiny.families()[name]
    torch.manual_seed(0)
    loop = DenoisingLoop(family.build(), steps=steps)
    sites = find_sites(loop.denoiser)
    count = len(family.guided.get("class_labels", [0]))
    errors = calibrate(loop, CachedForward(loop.denoiser, sites), [(family.guided, generators(count))], **options)
    _, costs = loop.probe(
        family.guided, generators(count), lambda call: count_costs(loop.denoiser, sites, call.forward)
    )
    return loop, errors, costs


def test_known_errors_give_the_known_schedule() -> None:
    rates = [0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.1]
    errors = drifting(rates, SITES[:1])
    assert rows(errors.schedule(0.05)) == "11111111"
    assert rows(errors.schedule(0.15)) == "10101010"  # step 6 computes in any case
    assert rows(errors.schedule(0.25)) == "10010010"
    assert rows(errors.schedule(9.0)) == "10001000"  # never longer than the lookahead
    assert rows(drifting(rates, SITES[:1], lookahead=1).schedule(9.0)) == "10101010"


def test_each_reused_entry_is_below_the_threshold() -> None:
    """A far step that happens to be alike does not make those before it reusable."""
    near, far = [NAN, 0.9, 0.9, 0.9], [NAN, NAN, 0.1, 0.1]
    errors = SmoothCacheErrors(np.array([near, far])[:, :, None], SITES[:1])
    assert rows(errors.schedule(0.5)) == "1111"


def test_threshold_is_strict_and_nothing_known_computes() -> None:
    errors = SmoothCacheErrors(np.array([[NAN, 0.25, NAN, np.inf]])[:, :, None], SITES[:1])
    assert rows(errors.schedule(0.25)) == "1111"
    assert rows(errors.schedule(0.26)) == "1011"
    assert rows(errors.schedule(1e9)) == "1011"


def test_kinds_decide_together_and_sites_alone() -> None:
    errors = np.full((1, 3, 4), np.nan)
    errors[0, 1] = [0.1, 0.8, 0.5, 0.8]  # attn, ff, attn, ff: means 0.3 and 0.8
    errors[0, 2] = [0.1, 0.2, 0.1, 0.9]  # ff: mean 0.55
    measured = SmoothCacheErrors(errors, SITES)
    together, alone = measured.schedule(0.4), measured.schedule(0.4, by="site")
    assert [rows(together, site) for site in range(4)] == ["101", "111", "101", "111"]
    assert [rows(alone, site) for site in range(4)] == ["101", "110", "110", "111"]


@pytest.mark.parametrize("by", ["kind", "site"])
def test_smoothcache_comes_nearest(by: Any) -> None:
    rates = np.random.default_rng(0).uniform(0.05, 0.3, 11).tolist()
    errors, costs = drifting(rates, SITES), additive_costs()
    thresholds = np.linspace(0, errors.errors[np.isfinite(errors.errors)].max() * 1.01, 4000)
    reachable = np.array([costs.speedup(errors.schedule(threshold, by).compute) for threshold in thresholds])
    curs = [errors.schedule(threshold, by).cur for threshold in thresholds]
    assert curs[0] == 0.0
    assert curs[-1] == 0.75  # of 12 steps, 0, 4 and 8 compute
    for speedup in (1.0, 1.2, 1.5, 2.0, reachable.max()):
        schedule = errors.at_speedup(costs, speedup, by)
        made_by = schedule.made_by
        assert made_by is not None
        reached = costs.speedup(schedule.compute)
        assert abs(reached - speedup) <= np.abs(reachable - speedup).min()
        assert schedule.compute[0].all()
        assert made_by.method == "smoothcache"
        assert made_by.hyper_parameters["speedup"] == reached
        threshold = made_by.hyper_parameters["threshold"]
        assert isinstance(threshold, float)
        assert np.array_equal(errors.schedule(threshold, by).compute, schedule.compute)
    with pytest.raises(TrainingError, match="cannot be reached"):
        errors.at_speedup(costs, reachable.max() + 0.01, by)
    with pytest.raises(ScheduleMismatchError, match="costs of the sites"):
        errors.at_speedup(additive_costs(SITES[::-1]), 1.5, by)


def test_more_is_reused_at_a_higher_threshold() -> None:
    errors = drifting(np.random.default_rng(1).uniform(0.05, 0.3, 19).tolist(), SITES)
    curs = [errors.schedule(threshold).cur for threshold in np.linspace(0, 4, 50)]
    assert curs == sorted(curs)
    assert len(set(curs)) > 4


def outputs_of(pipeline: Any, sites: Sequence[str], steps: int, count: int, **arguments: Any) -> list[list[Any]]:
    """Outputs of each site, one for each of its calls, in a plain run of the pipeline by its user."""
    seen: list[list[Any]] = [[] for _ in sites]
    handles = [
        pipeline.transformer.get_submodule(site).register_forward_hook(
            lambda _, args, output, found=found: found.append(pytree.tree_leaves(output))
        )
        for site, found in zip(sites, seen, strict=True)
    ]
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        num_inference_steps=steps,
        generator=generators(count),
        output_type="latent" if count == 1 else "np",
        **arguments,
    )
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["dit", "pixart-alpha", "flux", "sd3"])
def test_errors_are_those_of_a_plain_run(name: str) -> None:
    loop, measured, _ = calibrated(name, steps=5, lookahead=2)
    family = tiny.families()[name]
    count = len(family.guided.get("class_labels", [0]))
    seen = outputs_of(loop.pipeline, measured.sites, 5, count, **family.guided)
    streams = 2 if name == "flux" else 1  # true guidance calls the model twice per step
    assert all(len(found) == 5 * streams for found in seen)
    expected = np.full((2, 5, len(seen)), np.nan)
    for site, found in enumerate(seen):
        for j in (1, 2):
            for step in range(j, 5):
                errors = []
                for stream in range(streams):
                    new, old = found[step * streams + stream], found[(step - j) * streams + stream]
                    change = sum(float((n - o).abs().sum()) for n, o in zip(new, old, strict=True))
                    errors.append(change / sum(float(n.abs().sum()) for n in new))
                expected[j - 1, step, site] = sum(errors) / streams
    assert any(len(found[0]) > 1 for found in seen) == (name in ("flux", "sd3"))  # joint attention
    np.testing.assert_allclose(measured.errors, expected, rtol=1e-5)
    assert np.isfinite(measured.errors[:, 2:]).all()
    assert (measured.errors[:, 2:] > 0).all()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("dit", ["attn1", "ff"]),
        ("pixart-alpha", ["attn1", "attn2", "ff"]),
        ("flux", ["attn", "ff", "ff_context", "proj_out"]),
    ],
)
def test_smoothcache_makes_schedules_for_pipelines(name: str, kinds: list[str]) -> None:
    _, errors, costs = calibrated(name, steps=6)
    schedule = errors.at_speedup(costs, 1.4)
    assert list(schedule.cur_per_kind()) == kinds
    for kind in kinds:
        of_kind = [index for index, site in enumerate(schedule.sites) if site.endswith(f".{kind}")]
        columns = schedule.compute[:, of_kind]
        assert (columns == columns[:, :1]).all()
    assert 1.15 < costs.speedup(schedule.compute) < 1.65
    assert costs.speedup(errors.at_speedup(costs, 1.4, by="site").compute) == pytest.approx(1.4, abs=0.15)


def test_batches_are_averaged_and_the_pipeline_is_left_alone() -> None:
    family = tiny.families()["dit"]
    pipeline = family.build()
    pipeline.transformer.train()
    loop = DenoisingLoop(pipeline, steps=3)
    cached = CachedForward(loop.denoiser, find_sites(loop.denoiser))
    first = ({"class_labels": [1]}, 3)
    second = ({"class_labels": [2]}, 8)
    both, one, other = (
        calibrate(loop, cached, [(inputs, generators(seed=seed)) for inputs, seed in batches])
        for batches in ([first, second], [first], [second])
    )
    np.testing.assert_allclose(both.errors, (one.errors + other.errors) / 2)
    assert both.errors.shape == (3, 3, 4)
    assert np.isnan(both.errors[2]).all()  # three steps have no distance of three
    assert both.schedule(9.0).cur == pytest.approx(2 / 3)
    assert both.hyper_parameters == {"samples": 2}
    assert pipeline.transformer.training
    assert "forward" not in vars(pipeline.transformer)


class TwiceABlock(nn.Module):
    """A block that runs twice; its attention is linear, its feed-forward gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.ff = nn.Linear(4, 4)
        for parameter in (self.attn.bias, *self.ff.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.attn(x)
            x = x + self.ff(x)
        return x


class Loop:
    """A pipeline of three steps that scales what it starts from."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.scheduler = Scaling()

    def __call__(self, num_inference_steps: int, generator: Any, start: Tensor) -> None:
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            self.transformer(start)
            start = self.scheduler.step(None, t, start)[0]


class Scaling:
    """Each step doubles the sample."""

    def set_timesteps(self, count: int) -> None:
        self.timesteps = torch.arange(count)

    def step(self, model_output: Any, timestep: Any, sample: Tensor) -> tuple[Tensor]:
        return (2 * sample,)


def test_errors_of_tied_blocks_and_of_zero_outputs_are_known() -> None:
    model = TwiceABlock()
    sites = ["attn", "ff"]
    loop = DenoisingLoop(Loop(model), steps=3)
    errors = calibrate(loop, CachedForward(model, sites), [({"start": torch.full((2, 4), 1e-3)}, generators(2))]).errors
    # all outputs double from step to step, so half of the new one is news, and three quarters after two
    np.testing.assert_allclose(errors[0, 1:, 0], 0.5, rtol=1e-6)
    np.testing.assert_allclose(errors[1, 2, 0], 0.75, rtol=1e-6)
    assert (errors[0, 1:, 1] == 0.0).all()
    with pytest.raises(TrainingError, match="attn is not finite at step 0"):
        calibrate(loop, CachedForward(model, sites), [({"start": torch.full((2, 4), np.inf)}, generators(2))])


def test_fora_spaces_its_steps_evenly() -> None:
    costs = additive_costs()
    for k in (1, 2, 3, 4, 6, 12):
        every = Schedule.every(k, steps=12, sites=SITES).compute
        assert np.array_equal(fora(12, costs, costs.speedup(every)).compute, every)
    schedule = fora(10, costs, 1.9)
    assert schedule.made_by is not None
    assert schedule.made_by.method == "fora"
    assert rows(schedule) == "1010010010"
    assert schedule.made_by.hyper_parameters["computed_steps"] == 4
    reachable = [1 / (1 - 0.8 * (10 - n) / 10) for n in range(1, 11)]
    assert abs(costs.speedup(schedule.compute) - 1.9) == pytest.approx(min(abs(s - 1.9) for s in reachable))
    with pytest.raises(TrainingError, match="cannot be reached"):
        fora(10, costs, reachable[0] + 0.01)


def test_random_comes_nearest_and_is_repeatable() -> None:
    _, _, costs = calibrated("dit", steps=2)
    for speedup in (1.0, 1.3, 2.0):
        schedule = random_at(20, costs, speedup, seed=5)
        assert schedule == random_at(20, costs, speedup, seed=5)
        assert schedule.compute[0].all()
        assert schedule.made_by is not None
        reused = schedule.made_by.hyper_parameters["reused"]
        assert reused == (~schedule.compute).sum()
        distance = abs(costs.speedup(schedule.compute) - speedup)
        for count in range(20 * 4 - 3):
            other = Schedule.random(count / 80, steps=20, sites=costs.sites, seed=5)
            assert distance <= abs(costs.speedup(other.compute) - speedup)
    assert not np.array_equal(random_at(20, costs, 1.5, seed=5).compute, random_at(20, costs, 1.5, seed=6).compute)
    with pytest.raises(TrainingError, match="cannot be reached"):
        random_at(20, costs, 20.0, seed=5)


def test_fewer_steps_reach_the_speed_up() -> None:
    assert [fewer_steps(20, speedup) for speedup in (1.0, 1.5, 2.0, 3.0, 20.0)] == [20, 13, 10, 7, 1]
    with pytest.raises(TrainingError, match=r"20\.5 cannot be reached"):
        fewer_steps(20, 20.5)
    with pytest.raises(TrainingError, match=r"at least 1, got 0\.5"):
        fewer_steps(20, 0.5)


@pytest.mark.parametrize("count", [1, 300, 511, 512, 5000])
def test_nearest_finds_the_nearest_of_many(count: int) -> None:
    values = np.sort(np.random.default_rng(count).uniform(1, 4, count))
    for target in (values[0], values[-1], np.median(values)):
        index, reached = nearest(count, lambda i: float(values[i]), float(target))
        assert reached == values[index]
        assert abs(reached - target) == np.abs(values - target).min()


def test_bad_input_is_refused() -> None:
    loop = DenoisingLoop(tiny.dit(), steps=3)
    cached = CachedForward(loop.denoiser, find_sites(loop.denoiser))
    with pytest.raises(TrainingError, match="got none"):
        calibrate(loop, cached, [])
    with pytest.raises(TrainingError, match="lookahead: expected at least 1"):
        calibrate(loop, cached, [], lookahead=0)
    with pytest.raises(ValueError, match=r"lookahead, steps, 4"):
        SmoothCacheErrors(np.zeros((3, 5, 2)), SITES)
    with pytest.raises(ValueError, match="'kind' or 'site'"):
        drifting([0.1], SITES).schedule(0.5, by="block")  # type: ignore[arg-type]
