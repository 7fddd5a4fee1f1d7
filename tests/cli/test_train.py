"""`harmonica-rt train` as a user runs it, alone and under torchrun."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from harmonica_rt import Schedule
from harmonica_rt.cli import app
from harmonica_rt.cli.going_on import how_to_go_on
from harmonica_rt.errors import HarmonicaError
from harmonica_training import TrainConfig, TrainingInterrupted, train
from harmonica_training.checkpoint import latest_checkpoint, load_checkpoint
from tests import tiny
from tests.forked import forked, two_by_torchrun
from tests.training.small import dit

FEW = ["--steps", "5", "--iterations", "2", "--batch", "2", "--renew-every", "2", "--learning-rate", "0.3"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["train", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_trains_logs_and_goes_on(trainable: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "schedule.json", tmp_path / "work"
    labels = ["--labels", "0,1,2", "--guidance", "1", "--target-cur", "0.4", "--work", str(work)]
    told = run(str(trainable), str(out), *FEW, *labels)
    schedule = Schedule.load(out)
    assert schedule.cur == pytest.approx(0.4, rel=0.02)
    assert "CUR 40.0%" in told
    assert schedule.guidance == 1.0
    assert [path.name for path in work.glob("*.safetensors")] == ["iteration-000002.safetensors"]
    assert list((work / "log").glob("events.*"))
    told = run(str(trainable), str(out), *FEW, *labels)  # nothing is left to do, and the result is the same
    assert Schedule.load(out) == schedule


def test_a_schedule_that_cannot_be_written_is_kept_elsewhere(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        HarmonicaError, match=r"/dev/full: No space left on device; the schedule is in (.*\.json)"
    ) as said:
        run(str(trainable), "/dev/full", *FEW, "--labels", "0,1", "--guidance", "1", "--target-cur", "0.4")
    assert Schedule.load(str(said.value).rpartition(" ")[2]).cur == pytest.approx(0.4, rel=0.02)


def test_where_nothing_can_be_written_is_said_before_anything_is_learned(trainable: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(trainable), "/proc/schedule.json", *FEW, "--target-cur", "0.4"])
    assert result.exit_code == 2
    assert "the directory /proc cannot be written to" in " ".join(result.output.replace("│", " ").split())


def test_what_an_interrupted_training_learned_is_kept_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    checkpoints = tmp_path / "checkpoints"
    dit_trained = train(
        dit(), TrainConfig(steps=5, target_cur=0.4, iterations=1, batch=2, guidance=1.0), directory=checkpoints
    )
    assert dit_trained.schedule.steps == 5
    stop = TrainingInterrupted(1, latest_checkpoint(checkpoints), None)
    told = how_to_go_on(stop, None, Path("/proc/schedule.json"))
    kept = re.search(r"saved in (\S+);", told)
    assert kept is not None
    assert load_checkpoint(kept[1]).iteration == 1


def test_prompts_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny.pixart_from_words().save_pretrained(tmp_path / "pixart")
    (tmp_path / "prompts.txt").write_text("a small cat\n\nthe dog on the moon\n")
    size = ["--arg", "height=8", "--arg", "width=8", "--arg", "use_resolution_binning=false"]
    out = tmp_path / "schedule.json"
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--arg", "max_sequence_length=8"]
    run(str(tmp_path / "pixart"), str(out), *FEW, "--target-cur", "0.4", *size, *prompts)
    schedule = Schedule.load(out)
    assert schedule.made_by is not None
    assert schedule.made_by.hyper_parameters["conditions"]["count"] == 2  # type: ignore[index]
    assert schedule.sampler is not None
    assert schedule.sampler.class_name == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --target-speedup, --target-cur and --beta$"),
        (["--target-cur", "0.4", "--beta", "1"], "give one of .*, not --target-cur and --beta"),
        (["--target-cur", "0.4", "--image-error", "lpips"], "--image-error lpips is not known; choose one of sens"),
        (["--target-cur", "0.4", "--tau", "1"], "^--tau: expected a number between 0 and 1"),
        (["--target-cur", "0.4", "--arg", "num_inference_steps=3"], "--arg num_inference_steps=3: use --steps instead"),
        (["--target-cur", "0.4", "--arg", "guidance_scale=3"], "--arg guidance_scale=3: use --guidance instead"),
        (["--target-cur", "0.4", "--arg", "height=3"], "takes no argument 'height'"),
        (["--target-cur", "0.4", "--start", "."], "is a directory without a schedule.json"),
        (["--target-cur", "0.4", "--labels", "one"], "--labels: expected whole numbers"),
        (["--target-speedup", "9", "--guidance", "1"], "^--target-speedup: 9 cannot be reached"),
        (["--target-cur", "0.4", "--labels", "77"], "the pipeline has no label 77; it has 0 ... 9"),
    ],
)
def test_what_is_refused(trainable: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(HarmonicaError, match=message):
        run(str(trainable), str(tmp_path / "schedule.json"), *FEW, *arguments)
    assert not list(tmp_path.iterdir())


def test_two_processes_learn_the_same_schedule(trainable: Path, tmp_path: Path) -> None:
    arguments = [*FEW, "--iterations", "6", "--guidance", "1", "--target-cur", "0.4", "--image-error", "sensitivity"]
    alone, shared = tmp_path / "one.json", tmp_path / "two.json"
    run(str(trainable), str(alone), *arguments)
    words = ["harmonica_rt.cli", "train", str(trainable), str(shared), *arguments]
    output, environment = tmp_path / "told", {"GLOO_SOCKET_IFNAME": "lo"}
    process = forked(two_by_torchrun, *words, output=output, environment=environment)
    process.join()
    assert process.exitcode == 0, output.read_text()
    one, two = Schedule.load(alone), Schedule.load(shared)
    assert np.array_equal(one.compute, two.compute)
    assert one.made_by is not None
    assert two.made_by is not None
    assert two.made_by.hyper_parameters["processes"] == 2
    scores = [np.array([row for row in made.scores or () if row is not None]) for made in (one.made_by, two.made_by)]
    assert np.allclose(*scores, atol=0.02)


def test_without_tensorboard_only_the_log_is_missing(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    work = tmp_path / "work"
    told = run(
        str(trainable), str(tmp_path / "s.json"), *FEW, "--guidance", "1", "--target-cur", "0.4", "--work", str(work)
    )
    assert "only checkpoints are written, no TensorBoard log: " in told
    assert "pip install 'harmonica-rt[train]'" in told
    assert [path.name for path in work.iterdir()] == ["iteration-000002.safetensors"]


def test_out_of_memory_names_the_options_that_help(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("harmonica_training.trainer.Iterations.step", exhausted)
    with pytest.raises(HarmonicaError, match=r"out of memory: CUDA .*takes less with a smaller --batch or --checkpoin"):
        run(str(trainable), str(tmp_path / "s.json"), *FEW, "--guidance", "1", "--target-cur", "0.4")


def test_a_full_disk_under_the_log_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from torch.utils.tensorboard import SummaryWriter

    from harmonica_training.tensorboard_log import TensorBoardLog

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = TensorBoardLog(tmp_path)
    log.begin(2, 0)
    try:
        monkeypatch.setattr(SummaryWriter, "flush", full)
        with pytest.raises(OSError, match="No space left") as caught:
            log.renewed(1, [1.0, 2.0])
        assert caught.value.filename == str(tmp_path)
    finally:
        monkeypatch.undo()
        log.end()
