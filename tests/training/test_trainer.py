"""Training whole: it reaches its target, finds what is free to reuse, resumes exactly, refuses what it cannot do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_training import DivergenceError, TrainingError, train
from harmonica_training.checkpoint import latest_checkpoint
from harmonica_training.harmonica import HarmoniCa
from harmonica_training.progress import IterationRecord, Silent
from harmonica_training.sdt import StepLosses
from tests import tiny
from tests.training.small import PAPER, SITES, config, dit


@pytest.mark.parametrize(
    ("image_error", "options"),
    [
        pytest.param("leave-one-out", PAPER, id="leave-one-out", marks=pytest.mark.exhaustive),
        pytest.param("progressive", PAPER, id="progressive", marks=pytest.mark.exhaustive),
        pytest.param("sensitivity", {}, id="sensitivity-hard"),
        pytest.param(None, PAPER, id="sdt"),
        pytest.param(None, {}, id="sdt-hard", marks=pytest.mark.exhaustive),
    ],
)
def test_a_training_reaches_its_target_and_its_schedule_runs(
    image_error: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = dit()
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    result = train(pipeline, config(image_error=image_error, **options))
    schedule = result.schedule
    assert result.speedup == pytest.approx(1.4, rel=0.02)
    if not options:  # hard gates are on their target all the while
        assert [record.speedup for record in result.history] == pytest.approx([1.4] * 12, rel=0.02)
    assert all(torch.equal(before[name], value) for name, value in pipeline.transformer.state_dict().items())
    assert all(parameter.requires_grad for parameter in pipeline.transformer.parameters())

    schedule.save(tmp_path / "schedule.json")
    loaded = Schedule.load(tmp_path / "schedule.json")
    assert loaded == schedule
    assert loaded.made_by is not None
    assert loaded.made_by.method == ("sdt" if image_error is None else "harmonica")
    assert loaded.made_by.hyper_parameters["target_speedup"] == 1.4
    assert loaded.made_by.hyper_parameters["conditions"]["count"] == 10  # type: ignore[index]
    assert loaded.sampler is not None
    assert loaded.sampler.class_name == "DDIMScheduler"
    assert loaded.timesteps == tuple(float(t) for t in range(875, -1, -125))

    hrt.compile(pipeline, loaded)  # made for this very model
    pipeline(class_labels=[3], guidance_scale=1.0, num_inference_steps=8)
    plan = hrt.get_compiled(pipeline).report().plans[-1]
    assert plan.theoretical_speedup == pytest.approx(result.speedup, rel=1e-9)


def test_same_seed_same_schedule() -> None:
    few = {"steps": 5, "iterations": 3}
    first, again = (train(dit(layers=3), config(**few)) for _ in range(2))
    assert np.array_equal(first.scores, again.scores)
    assert not np.array_equal(first.scores, train(dit(layers=3), config(**few, seed=1)).scores)


def test_what_is_free_is_reused_first() -> None:
    """Attention of the first three blocks gives a constant: whatever else is learned, it is reused."""
    pipeline = dit()
    for block in pipeline.transformer.transformer_blocks[:3]:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    result = train(pipeline, config(target_cur=0.25, iterations=40, image_error=None, **PAPER))
    chosen = [f"transformer_blocks.{i}.attn1" in result.schedule.sites for i in range(3)]
    assert all(chosen)
    columns = [result.schedule.sites.index(f"transformer_blocks.{i}.attn1") for i in range(3)]
    others = [i for i in range(SITES) if i not in columns]
    reused = ~result.schedule.compute[1:]
    assert reused[:, columns].mean() > 0.9
    assert reused[:, others].mean() < 0.2


class Killed(Exception):
    """Stands for a kill."""


class KilledAfter(Silent):
    """Ends a training after some iterations, as a kill would."""

    def __init__(self, iteration: int) -> None:
        self._last = iteration

    def iteration(self, record: IterationRecord) -> None:
        if record.iteration == self._last:
            raise Killed


@pytest.mark.parametrize("options", [{}, {"image_error": "leave-one-out", **PAPER}], ids=["hard", "soft"])
def test_a_killed_training_continues_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    chosen = config(steps=5, iterations=9, renew_every=2, checkpoint_every=3, **options)
    whole = train(dit(layers=3), chosen)
    with pytest.raises(Killed):
        train(dit(layers=3), chosen, directory=tmp_path, progress=KilledAfter(8))
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.iteration == 6  # one interval is lost at most
    resumed = train(dit(layers=3), chosen, directory=tmp_path)
    assert [record.iteration for record in resumed.history] == [7, 8, 9]
    assert np.array_equal(resumed.scores, whole.scores)
    assert resumed.schedule == whole.schedule
    assert resumed.beta == whole.beta
    longer = train(
        dit(layers=3), config(**{**vars(chosen), "target_speedup": 1.4, "iterations": 11}), directory=tmp_path
    )
    assert len(longer.history) == 2


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    train(dit(), config(iterations=1), directory=tmp_path)
    with pytest.raises(TrainingError, match=r"another training: config: learning_rate: 0.3 there, 0.1 here"):
        train(dit(), config(iterations=1, learning_rate=0.1), directory=tmp_path)
    with pytest.raises(TrainingError, match="another training: model"):
        train(dit(layers=7), config(iterations=1), directory=tmp_path)


def test_a_training_starts_from_a_schedule() -> None:
    pipeline = dit()
    start = Schedule.every(2, steps=8, sites=hrt.find_sites(pipeline.transformer))
    still = config(beta=0.0, iterations=1, learning_rate=0.0, spread=0.0)
    assert np.array_equal(train(pipeline, still, start=start).schedule.compute, start.compute)
    learned = train(pipeline, config(iterations=3)).schedule
    again = train(pipeline, still, start=learned)
    assert np.allclose(again.scores[1:], 1 / (1 + np.exp(-np.array(learned.made_by.scores[1:]))), atol=1e-4)  # type: ignore[union-attr, index]
    with pytest.raises(TrainingError, match="has 4 steps and 12 sites; this training has 8 steps"):
        train(pipeline, still, start=Schedule.every(2, steps=4, sites=start.sites))


def test_coherent_sites_are_reused_together() -> None:
    """All but one step, which the target splits, computes all of its sites or none."""
    rows = train(dit(), config(target_cur=0.4, iterations=6)).schedule.compute
    assert sum(0 < row.sum() < SITES for row in rows) <= 1
    rows = train(dit(), config(target_cur=0.4, iterations=6, coherence=0.0)).schedule.compute
    assert sum(0 < row.sum() < SITES for row in rows) > 1


def test_nan_in_the_error_ends_the_training() -> None:
    pipeline = dit()
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[2].ff.net[2].weight[0, 0] = float("nan")
    with pytest.raises(DivergenceError, match="the error of step 1 is not finite"):
        train(pipeline, config())


def test_divergence_ends_the_training() -> None:
    class FarOff(HarmoniCa):
        """Finds predictions that are off by eleven times their own size."""

        def losses(self, *args: Any) -> StepLosses:
            losses = super().losses(*args)
            return replace(losses, mse=11 * losses.power)

    with pytest.raises(DivergenceError, match="iteration 0: the squared error under cache is 11 times"):
        train(dit(), config(image_error=None), objective=FarOff)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_speedup": 1.5, "beta": 1.0}, "exactly one of target_speedup, target_cur and beta"),
        ({"target_speedup": 0.5}, "target_speedup: expected 1 ... inf, got 0.5"),
        ({"target_cur": 0.99}, "target_cur: 0.99 cannot be reached"),
        ({"tau": 1.0}, "tau: expected a number between 0 and 1"),
        ({"steps": 1}, "steps: a run of one step"),
        ({"iterations": 2.5}, "iterations: expected a whole number"),
        ({"target_speedup": "1.5"}, "target_speedup: expected a number, got '1.5'"),
        ({"image_error": "none"}, "image_error: expected one of"),
        ({"arguments": {"hight": 3}}, "takes no argument hight"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train(dit(), config(**options))


def test_arguments_that_train_cannot_take_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"load it first: DiffusionPipeline\.from_pretrained\('some/model'\)"):
        train("some/model", config())
    with pytest.raises(TrainingError, match="expected a TrainConfig, got a dict"):
        train(dit(), {"steps": 5})  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"directory: .* is a file"):
        train(dit(), config(), directory=tmp_path / "file")


def test_a_compiled_model_that_was_assigned_is_named() -> None:
    pipeline = dit()
    schedule = Schedule.every(2, steps=5, sites=hrt.find_sites(pipeline.transformer))
    pipeline.transformer = hrt.compile(pipeline.transformer, schedule)
    with pytest.raises(
        TrainingError, match=r"compiled model; .* plain ones: pipe\.transformer = pipe\.transformer\.given"
    ):
        train(pipeline, config())
    pipeline.transformer = pipeline.transformer.given
    assert train(pipeline, config(iterations=1)).schedule.steps == 8


@pytest.mark.parametrize("family", ["pixart-alpha", "sd3", "flux"])
def test_other_families_can_be_trained(family: str) -> None:
    from harmonica_training import Embeddings

    described = tiny.families()[family]
    pipeline = described.build()
    pipeline.set_progress_bar_config(disable=True)
    tensors = {name: value for name, value in described.guided.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in described.guided.items() if name not in tensors}
    conditions = Embeddings({name: torch.cat([value, value.flip(-1)]) for name, value in tensors.items()})
    chosen = config(steps=4, iterations=3, guidance=None, arguments=rest, target_cur=0.4)
    result = train(pipeline, chosen, conditions=conditions)
    assert result.schedule.cur == pytest.approx(0.4, abs=1 / result.scores.size)
    if family == "flux":
        assert any(site.endswith("proj_out") for site in result.schedule.sites)
