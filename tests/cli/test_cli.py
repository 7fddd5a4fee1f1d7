"""Each command on real files: what it prints, what it writes, how it fails."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from typer.testing import CliRunner, Result

from harmonica_rt import Schedule, cli
from harmonica_rt.demo import bundled_model
from harmonica_rt.demo.run import DEFAULT_GUIDANCE, guidance_of
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.lower import plain
from harmonica_rt.options import CompileOptions
from tests.tiny import dit, pixart_alpha, pixart_from_words, saved_and_loaded

STEPS = "4"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit")
    saved_and_loaded(dit, path)
    return path


@pytest.fixture
def schedule(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "schedule.json"
    assert run("schedule", "make", model, path, "--steps", STEPS, "--random", "0.5").exit_code == 0
    return path


def run(*arguments: object) -> Result:
    """Run a command in this process; errors of the project come back as `result.exception`."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_demo_compares_measures_and_draws(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    result = run("demo", "--model", model, "--steps", STEPS, "--batch", 3, "--repeats", 1, "--out", picture)
    assert result.exit_code == 0, result.output
    assert "parity ok (measured): 4 calls" in result.output
    assert "theoretical (FLOPs)" in result.output
    assert "50.0% of all entries reused" in result.output
    assert "  round 1 of 1" in result.output
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width == 1680
    assert 800 < height < 2000


def test_demo_tells_no_speedup_where_parity_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = plain.Program.__call__
    monkeypatch.setattr(plain.Program, "__call__", lambda *args: tuple(output * 1.01 for output in original(*args)))
    result = run("demo", "--model", model, "--steps", STEPS, "--repeats", 1, "--out", tmp_path / "demo.png")
    assert result.exit_code == 1
    assert "parity FAILED" in result.output
    assert "speed-up withheld: images differ" in result.output
    assert not (tmp_path / "demo.png").exists()


def test_demo_is_for_dit(tmp_path: Path) -> None:
    saved_and_loaded(pixart_alpha, tmp_path)
    result = run("demo", "--model", tmp_path)
    assert isinstance(result.exception, HarmonicaError)
    assert f"the demo is for a DiTPipeline, {tmp_path} holds a PixArtAlphaPipeline" in str(result.exception)


def test_demo_uses_the_recorded_guidance(tmp_path: Path) -> None:
    assert guidance_of(tmp_path) == DEFAULT_GUIDANCE
    record = tmp_path / "PROVENANCE.json"
    record.write_text('{"evaluation": {"guidance_scale": 1.5}}')
    assert guidance_of(tmp_path) == 1.5
    for malformed in ("{nope", "[]", '{"evaluation": 3}', '{"evaluation": {"guidance_scale": []}}'):
        record.write_text(malformed)
        with pytest.raises(HarmonicaError, match=r"PROVENANCE\.json: expected"):
            guidance_of(tmp_path)


def test_sites(model: Path) -> None:
    result = run("sites", model)
    assert result.stdout.splitlines()[:2] == ["transformer_blocks.0.attn1", "transformer_blocks.0.ff"]
    assert "4 sites of DiTTransformer2DModel: 2 attn1, 2 ff" in result.output
    only = run("sites", model, "--pattern", "transformer_blocks.*.ff")
    assert "2 sites of DiTTransformer2DModel: 2 ff" in only.output


def test_schedule_made_shown_and_drawn(schedule: Path, tmp_path: Path) -> None:
    made = Schedule.load(schedule)
    assert (made.steps, made.cur) == (4, 0.5)
    assert made.model is not None
    assert made.model.class_name == "DiTTransformer2DModel"
    shown = run("schedule", "show", schedule)
    assert "4 steps x 4 sites, CUR 50.00%" in shown.output
    assert run("schedule", "plot", schedule, tmp_path / "heat.png").exit_code == 0
    assert matplotlib.image.imread(tmp_path / "heat.png").shape[0] > 100


@pytest.mark.parametrize(
    ("options", "rows"),
    [(["--every", "2"], ["1111", "0000"] * 2), (["--mask", "1101"], ["1111", "1111", "0000", "1111"])],
    ids=["every", "mask"],
)
def test_schedule_make(model: Path, tmp_path: Path, options: list[str], rows: list[str]) -> None:
    path = tmp_path / "made.json"
    assert run("schedule", "make", model, path, "--steps", STEPS, *options).exit_code == 0
    assert json.loads(path.read_text())["compute"] == rows


def test_schedule_make_with_chosen_sites(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    made = run("schedule", "make", model, path, "--every", 2, "--pattern", "*.0.ff", "--pattern", "*.1.attn1")
    assert made.exit_code == 0, made.exception
    assert Schedule.load(path).sites == ("transformer_blocks.0.ff", "transformer_blocks.1.attn1")
    assert Schedule.load(path).steps == 20
    assert "matches" in str(run("schedule", "make", model, path, "--every", 2, "--pattern", "nothing").exception)


@pytest.mark.parametrize(("steps", "works"), [(["--steps", 3], False), (["--steps", 4], True), ([], True)])
def test_a_mask_and_steps_that_contradict_it(model: Path, tmp_path: Path, steps: list[object], works: bool) -> None:
    result = run("schedule", "make", model, tmp_path / "x.json", "--mask", "1101", *steps)
    assert (result.exit_code == 0) is works
    assert works or "--mask has 4 entries, one per step, and --steps says 3" in str(result.exception)
    assert (tmp_path / "x.json").exists() is works


def test_a_directory_with_a_schedule_is_one(model: Path, schedule: Path, tmp_path: Path) -> None:
    Schedule.load(schedule).save_pretrained(tmp_path / "folder")
    assert "4 steps x 4 sites" in run("schedule", "show", tmp_path / "folder").output
    assert "parity ok" in run("verify", model, tmp_path / "folder").output


def test_a_router_in_the_place_of_a_schedule_is_named_as_one(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "router.pt")
    assert "`harmonica-rt schedule convert` makes" in str(run("schedule", "show", tmp_path / "router.pt").exception)


def test_demo_steps_that_contradict_the_schedule(model: Path, schedule: Path, tmp_path: Path) -> None:
    result = run("demo", "--model", model, "--schedule", schedule, "--steps", 5, "--out", tmp_path / "demo.png")
    assert f"--steps says 5, and {schedule} is for 4 steps; leave --steps out" in str(result.exception)


@pytest.mark.parametrize("columns", ["20", "40", "200"])
def test_names_are_never_cut(columns: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harmonica_rt import recipes

    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(cli.console.console, "_width", None)
    lines = run("recipes").output.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == list(recipes.known())
    assert "    model: facebook/DiT-XL-2-256" in lines
    assert "transformer_blocks.0.attn1" in run("sites", model).output.splitlines()
    deep = tmp_path / ("a" * 60) / ("b" * 60)
    deep.mkdir(parents=True)
    assert (
        f"written to {deep / 'x.json'}"
        in run("schedule", "make", model, deep / "x.json", "--every", 2).output.splitlines()
    )


def test_schedule_make_wants_one_method(model: Path, tmp_path: Path) -> None:
    result = run("schedule", "make", model, tmp_path / "x.json", "--every", 2, "--random", 0.5)
    assert "give exactly one of --every" in str(result.exception)


def test_schedule_convert(tmp_path: Path) -> None:
    logits = torch.full((2 * 3,), 5.0)
    routers = {f"{step}.prob": logits.clone() for step in range(4)}
    routers["0.prob"][1] = -5.0  # the last step reuses the first MLP
    torch.save({"routers": routers, "opt": {}, "args": None}, tmp_path / "router.pt")
    path = tmp_path / "out.json"
    result = run("schedule", "convert", tmp_path / "router.pt", path, "--kind", "harmonica")
    assert result.exit_code == 0, result.exception
    assert json.loads(path.read_text())["compute"] == ["111111"] * 3 + ["101111"]
    unknown = run("schedule", "convert", tmp_path / "router.pt", path, "--kind", "mine")
    assert "--kind mine is not known" in str(unknown.exception)


def test_verify(model: Path, schedule: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = run("verify", model, schedule, "--lowering", "plain", "--arg", "class_labels=[3]")
    assert exact.exit_code == 0
    assert "4 equal bit for bit" in exact.output
    good = run("verify", model, schedule, "--arg", "class_labels=[3]")
    assert good.exit_code == 0
    assert "parity ok (measured)" in good.output
    original = plain.Program.__call__
    monkeypatch.setattr(plain.Program, "__call__", lambda *args: tuple(output * 1.01 for output in original(*args)))
    bad = run("verify", model, schedule)
    assert bad.exit_code == 1
    assert "parity FAILED" in bad.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arg", "prompt=cat"], "takes no argument 'prompt'"),
        (["--arg", "class_labels"], "expected name=value"),
        (["--tolerance", "loose"], "--tolerance loose is not known"),
        (["--arg", "self=1"], "takes no argument 'self'"),
        (["--arg", "generator=1"], "generators are made from --seed"),
        (["--arg", "class_labels=[77777]"], "failed when called with num_inference_steps=4, class_labels=[77777]: Ind"),
        (["--arg", "class_labels=[]"], "failed when called with num_inference_steps=4, class_labels=[]: RuntimeError"),
        (["--arg", "guidance_scale=2", "--guidance", "3"], "say the same; give one of them"),
        (["--arg", "num_inference_steps=7"], "or pass --arg num_inference_steps=VALUE so that"),
        (
            ["--arg", "class_labels=7"],
            "failed when called with num_inference_steps=4, class_labels=7: TypeError: object of type 'int'",
        ),
        (["--dtype", "int8"], "dtype int8 is not known"),
        (["--device", "banana"], "device 'banana' is not known"),
        (["--device", "cpu:x"], "device 'cpu:x' is not known"),
        (["--device", "meta"], "device 'meta' is not supported"),
        (["--device", "cuda:99"], "there is no device cuda:99"),
    ],
    ids=[
        "argument",
        "pair",
        "tolerance",
        "self",
        "generator",
        "unknown-class",
        "no-class",
        "guidance-twice",
        "steps",
        "value",
        "dtype",
        "device",
        "index",
        "kind-of-device",
        "absent-device",
    ],
)
def test_verify_refuses_bad_options(model: Path, schedule: Path, options: list[str], message: str) -> None:
    assert message in str(run("verify", model, schedule, *options).exception)


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_graphs_reach_the_compiler(command: str, model: Path, schedule: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(CompileOptions, "__post_init__", lambda options: given.append(options.graphs))
    assert run(command, model, schedule, "--graphs", "off", *["--repeats", 1] * (command == "bench")).exit_code == 0
    assert "off" in given


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_unknown_graphs_are_refused(command: str, model: Path, schedule: Path) -> None:
    message = str(run(command, model, schedule, "--graphs", "maybe").exception)
    assert message == "graphs 'maybe' is not known; choose one of auto, on, off"


def test_bench(model: Path, schedule: Path) -> None:
    result = run("bench", model, schedule, "--repeats", 1)
    assert result.exit_code == 0, result.output
    assert "theoretical speed-up" in result.output
    assert "parity ok" in result.output


def test_doctor_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    result = run("doctor")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert "none found (NVML Shared Library Not Found)" in result.output
    assert "lowerings      fused" in result.output
    assert "ops on CUDA    Triton" in result.output


def test_doctor_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    class Memory:
        free, total = 60 * 2**30, 80 * 2**30

    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": "590.1",
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetMemoryInfo": Memory,
        "nvmlDeviceGetName": "Some GPU",
        "nvmlDeviceGetClockInfo": 1200,
        "nvmlDeviceGetMaxClockInfo": 1980,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    doctor = importlib.import_module("harmonica_rt.cli.doctor")  # the name in the package is the command
    assert doctor._gpus() == ["Some GPU, driver 590.1, 60.0 of 80.0 GiB free, SM clock 1200 of 1980 MHz"]


def test_doctor_notices_a_broken_build(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    import harmonica_kernels

    broken = dataclasses.replace(harmonica_kernels.build_info(), extension=False, reason="it is torn", chosen=False)
    monkeypatch.setattr(harmonica_kernels, "build_info", lambda: broken)
    result = run("doctor")
    assert result.exit_code == 1
    assert "not built: it is torn" in result.output


def fails(*arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the whole command line writes to stderr as it ends with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["harmonica-rt", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    return capsys.readouterr().err


def test_errors_end_as_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.json"
    told = fails("schedule", "show", missing, monkeypatch=monkeypatch, capsys=capsys)
    assert told == f"error: {missing}: no such schedule file\n"
    (tmp_path / "mine.json").write_text("{}")
    told = fails("schedule", "show", tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert told == (
        f"error: {tmp_path} is a directory without a schedule.json; give the schedule file itself (it has mine.json)\n"
    )
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


METADATA = ["torch>=2.10", "huggingface_hub", 'transformers>=4; extra == "models"', 'peft; extra == "models"']
METADATA += ['transformers>=4; extra == "test"', 'peft; extra == "test"', 'pytest; extra == "test"']
METADATA += ["scikit-learn>=1.4; extra == 'train'"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ModuleNotFoundError("x", name="transformers.models"),
            "transformers is not installed: pip install 'harm.*models",
        ),
        (
            ModuleNotFoundError("x", name="sklearn"),
            r"scikit-learn is not installed: pip install 'harmonica-rt\[train\]'",
        ),
        (
            ModuleNotFoundError("x", name="huggingface_hub"),
            "huggingface-hub is not installed: pip install harmonica-rt$",
        ),
        (ModuleNotFoundError("x", name="ftfy"), "the package ftfy is not installed: pip install ftfy"),
        (ImportError("LoRA requires the peft library, which is absent"), r"peft is not installed: .*\[models\]"),
    ],
    ids=["extra", "other-name", "required", "of-another-library", "in-words"],
)
def test_missing_packages_are_named_with_their_extra(
    error: ImportError, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harmonica_rt.cli import packages

    monkeypatch.setattr(packages.metadata, "requires", lambda _: METADATA)
    monkeypatch.setattr(packages, "_installed", lambda _: False)
    found = packages.remedy(error)
    assert found is not None
    assert re.search(told, found)
    monkeypatch.setattr(packages, "_installed", lambda _: True)
    assert packages.remedy(ImportError("peft is of a version that does not do")) is None


def test_a_pipeline_without_transformers_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harmonica_rt.cli import packages

    saved_and_loaded(pixart_from_words, tmp_path)
    monkeypatch.setattr(packages.metadata, "requires", lambda _: METADATA)
    installed = packages._installed
    monkeypatch.setattr(packages, "_installed", lambda name: name != "transformers" and installed(name))
    assert str(run("sites", tmp_path).exception) == (
        f"the pipeline in {tmp_path} has components of transformers: "
        "the package transformers is not installed: pip install 'harmonica-rt[models]'"
    )


@pytest.mark.parametrize("command", ["recipes", "sites", "schedule"])
def test_a_closed_pipe_and_a_full_disk_behind_the_output(command: str, tmp_path: Path) -> None:
    arguments = {"recipes": [], "sites": [str(bundled_model())], "schedule": ["show", str(bundled_model())]}[command]
    shell = f"{shlex.join([sys.executable, '-m', 'harmonica_rt.cli', command, *arguments])}"
    piped = subprocess.run(["bash", "-c", f"{shell} | true"], capture_output=True, text=True)
    assert piped.stderr == ""
    full = subprocess.run(["bash", "-c", f"{shell} > /dev/full"], capture_output=True, text=True)
    assert full.returncode == 2
    assert full.stderr == "error: No space left on device\n"


def test_loading_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    voices = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    for voice in voices:
        voice.enable_propagation()  # to caplog; the handlers hold the stderr of their first import
    try:
        before = [(voice.get_verbosity(), voice.is_progress_bar_enabled()) for voice in voices]
        assert run("sites", bundled_model()).exit_code == 0
        assert (capsys.readouterr().err, caplog.messages) == ("", [])
        assert [(voice.get_verbosity(), voice.is_progress_bar_enabled()) for voice in voices] == before
        assert run("--debug", "sites", bundled_model()).exit_code == 0
        assert any("id2label" in message for message in caplog.messages)
    finally:
        cli.console.set_debug(False)
        for voice in voices:
            voice.disable_propagation()


def test_help_and_version_load_no_torch() -> None:
    code = "import sys; from harmonica_rt import cli; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert run("--version").output == "harmonica-rt 0.1.0\n"
