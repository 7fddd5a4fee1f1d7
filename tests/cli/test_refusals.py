"""Errors end as one message, and options are checked before the work begins."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from harmonica_rt import cli
from harmonica_rt.demo import bundled_model
from tests.cli.running import fails, run


def test_errors_end_as_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.json"
    told = fails("schedule", "show", missing, monkeypatch=monkeypatch, capsys=capsys)
    assert told == f"error: {missing}: no such schedule file\n"
    (tmp_path / "mine.json").write_text("{}")
    told = fails("schedule", "show", tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert told.startswith(f"error: {tmp_path / 'mine.json'}: format: expected 'harmonica-schedule', got None")
    monkeypatch.setattr(sys, "argv", ["harmonica-rt", "--debug", "schedule", "show", str(missing)])
    with pytest.raises(FileNotFoundError):
        cli.main()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_index.json", b"{nope"),
        ("model_index.json", b"[]"),
        ("model_index.json", b'{"_class_name": "NoSuchPipeline"}'),
        ("transformer/config.json", None),
        ("transformer/config.json", b'{"_class_name": "DiTTransformer2DModel", "num_layers": 3}'),
        ("transformer/diffusion_pytorch_model.safetensors", None),
        ("transformer/diffusion_pytorch_model.safetensors", b"garbage"),
    ],
    ids=["no-json", "no-object", "no-class", "no-config", "other-config", "no-weights", "broken-weights"],
)
def test_a_damaged_pipeline_ends_as_one_message(
    model: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = shutil.copytree(model, tmp_path / "damaged")
    if content is None:
        (damaged / name).unlink()
    else:
        (damaged / name).write_bytes(content)
    told = fails("sites", damaged, monkeypatch=monkeypatch, capsys=capsys)
    assert told.startswith(f"error: the pipeline in {damaged} cannot be loaded: ")


def test_a_damaged_weights_file_of_any_kind_ends_as_one_message(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of readers have types of their own; what memory runs out for is told as that."""
    import diffusers

    class ReaderError(Exception):
        pass

    def damaged(*_: object, **__: object) -> None:
        raise ReaderError("header too large. See the stack trace above.") from KeyError("metadata")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", damaged)
    told = str(run("sites", model).exception)
    assert told == f"the pipeline in {model} cannot be loaded: ReaderError: header too large. (KeyError: 'metadata')"

    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", exhausted)
    result = run("verify", model, bundled_model() / "schedule.json")
    assert str(result.exception) == (
        "out of memory: CUDA out of memory. Tried to allocate 20.00 GiB.; it takes less with --dtype bf16"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule", "make", "model", "none/x.json", "--every", "2"], "there is no directory none"),
        (["schedule", "make", "model", ".", "--every", "2"], "is a directory"),
        (["schedule", "plot", "schedule.json", "x.txt"], "expected a name that ends in .png"),
        (["demo", "--out", "none/x.png"], "there is no directory none"),
        (["train", "model", "x.json", "--work", f"{__file__}/work"], "is a file, so there can be no directory"),
        (["schedule", "make", "model", "x.json", "--every", "0"], "Invalid value for '--every'"),
        (["schedule", "make", "model", "x.json", "--every", "2", "--steps", "-1"], "Invalid value for '--steps'"),
        (["schedule", "make", "model", "x.json", "--random", "1.5"], "Invalid value for '--random'"),
        (["bench", "model", "schedule.json", "--repeats", "0"], "Invalid value for '--repeats'"),
        (["verify", "model", "schedule.json", "--seed", "-1"], "Invalid value for '--seed'"),
    ],
    ids=["no-parent", "directory", "no-picture", "demo", "work", "every", "steps", "random", "repeats", "seed"],
)
def test_options_are_checked_before_the_work(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("target_speedup: 9 cannot be reached", {"target_speedup": "--target-speedup"}, "--target-speedup: 9 cannot"),
        ("tau: expected less", {"tau": "--tau"}, "--tau: expected less"),
        ("pass num_inference_steps=7", {"steps": "--steps"}, "pass num_inference_steps=7"),
        ("so that num_inference_steps fits", {"steps": "--steps"}, "so that --steps fits"),
        ("runs/target_cur/x.json: no such file", {"target_cur": "--target-cur"}, "runs/target_cur/x.json: no such"),
        ("the batch is small", {"batch": "--batch"}, "the batch is small"),
        ("model: is missing", {"model": "MODEL"}, "model: is missing"),
    ],
)
def test_messages_name_options(text: str, names: dict[str, str], expected: str) -> None:
    from harmonica_rt.cli.command import in_options

    assert in_options(text, names).startswith(expected)
