"""The emoji model: its data, a tiny run that is interrupted, and what a run writes."""

import dataclasses
import json
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the emoji model is a diffusers pipeline")
pytest.importorskip("transformers", reason="its prompts have a T5 encoder")

import harmonica_rt as hrt
from harmonica_training.emoji import (
    EmojiClassifier,
    EmojiConfig,
    EvaluationConfig,
    Glyphs,
    Scene,
    evaluate,
    export,
    find_font,
    judge,
    load_classifier,
    load_glyphs,
    load_pipeline,
    load_prompts,
    sample,
    train,
    trained_so_far,
)
from harmonica_training.emoji import __main__ as command_line
from harmonica_training.emoji.classifier import cell_labels
from harmonica_training.emoji.drawing import draw, fresh_pictures
from harmonica_training.emoji.evaluate import PROMPTS
from harmonica_training.emoji.judging import share
from harmonica_training.emoji.names import COLOURS, EMOJI
from harmonica_training.emoji.sampling import threads
from harmonica_training.emoji.scenes import ARRANGEMENTS, SIZES, draw_scene
from harmonica_training.emoji.streams import Use, stream
from harmonica_training.emoji.training import Course, StoppedError, Workers
from harmonica_training.emoji.vocabulary import TOKENS, build_tokenizer, tokenize
from harmonica_training.errors import TrainingError

CONFIG = EmojiConfig.quick()
MEASURED = EvaluationConfig(prompts=6, steps=2, batch=6)
STEPS = 4


@pytest.fixture(autouse=True)
def one_thread_and_quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Operators this small gain nothing from threads, and lose much to them on a busy machine."""
    caplog.set_level(logging.ERROR)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def squares(count: int = 3) -> Glyphs:
    """Emoji that need no font: opaque squares of a colour of their own."""
    colours = [(index % 2, (index // 2) % 2, (index // 4) % 2) for index in range(count)]
    sprites = tuple(
        {size: np.full((size, size, 4), (*colour, 1.0), np.float32) for size in SIZES} for colour in colours
    )
    return Glyphs(sprites, np.ones((count, len(COLOURS)), np.bool_), "0" * 64)


def workers(threads: int = 1) -> Workers:
    return Workers(threads, threading.Event())


class EverySecondStep(threading.Event):
    """A flag that is set every second time that it is looked at; the loop looks once per step."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def is_set(self) -> bool:
        self.looks += 1
        return self.looks % 2 == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("work")
    train(CONFIG, STEPS, squares(), folder, workers())
    return folder


@pytest.fixture(scope="module")
def model(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of that run as a directory."""
    out = tmp_path_factory.mktemp("model")
    with threads(1):
        export(trained_so_far(CONFIG, squares(), work), squares(), CONFIG, MEASURED, out, command="test")
    return out


def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(work: Path, tmp_path: Path) -> None:
    stops = 0
    while True:  # with another number of threads, too
        try:
            train(CONFIG, STEPS, squares(), tmp_path, Workers(2, EverySecondStep()))
            break
        except StoppedError:
            stops += 1
    assert stops == 3  # in the middle of each of three stages
    for name in ("autoencoder.pt", "classifier.pt", "denoiser.pt"):
        whole, interrupted = (torch.load(folder / name, weights_only=True) for folder in (work, tmp_path))
        assert interrupted["step"] == whole["step"] == STEPS
        assert interrupted["resumed"] == [2]
        assert interrupted["losses"] == whole["losses"]
        for part in ("model", "averages"):
            assert interrupted[part].keys() == whole[part].keys()
            assert all(torch.equal(value, interrupted[part][key]) for key, value in whole[part].items())
        before, after = whole["optimizer"]["state"], interrupted["optimizer"]["state"]
        assert all(torch.equal(value, after[index][key]) for index in before for key, value in before[index].items())


def test_every_parameter_learns(work: Path) -> None:
    tokens = 0
    for name in ("autoencoder.pt", "classifier.pt", "denoiser.pt"):
        state = torch.load(work / name, weights_only=True)
        moments = [entry["exp_avg_sq"] for entry in state["optimizer"]["state"].values()]
        assert len(moments) == len(state["averages"])
        tokens += sum(int((moment == 0).all()) for moment in moments)
    assert tokens == 0


def test_work_of_another_configuration_and_damaged_checkpoints_are_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers"):
        train(dataclasses.replace(CONFIG, layers=3), STEPS, squares(), work, workers())
    with pytest.raises(FileNotFoundError):
        trained_so_far(CONFIG, squares(), tmp_path)
    (tmp_path / "autoencoder.pt").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"autoencoder\.pt"):
        train(CONFIG, STEPS, squares(), tmp_path, workers())


def test_the_learning_rate_rises_stays_and_falls() -> None:
    course = Course("any", steps=1000, rate=2.0)
    assert course.rate_at(0) == pytest.approx(2.0 / 50)
    assert course.rate_at(49) == course.rate_at(800) == pytest.approx(2.0)
    assert course.rate_at(900) == pytest.approx(1.0)
    assert course.rate_at(999) == pytest.approx(2.0 / 200)


def test_the_exported_pipeline_loads_samples_and_compiles(model: Path) -> None:
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline.from_pretrained(model, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.float32}
    call: dict[str, Any] = {"prompt": ["a red heart left of an octopus on blue"], "use_resolution_binning": False}

    def latents(steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        result = pipe(**call, num_inference_steps=steps, generator=generator, output_type="latent").images
        assert isinstance(result, torch.Tensor)
        return result

    plain = latents(4)
    assert plain.shape == (1, 8, 16, 16)
    sites = hrt.find_sites(pipe.transformer)
    hrt.compile(pipe, hrt.Schedule.all_compute(steps=4, sites=sites), lowering="plain")
    assert torch.equal(latents(4), plain)
    hrt.uncompile(pipe)
    report = hrt.verify(
        pipe, hrt.Schedule.every(2, steps=4, sites=sites), lowering="plain", num_inference_steps=4, **call
    )
    assert report.ok
    assert report.trajectory_same_bits
    (image,) = pipe(**call, num_inference_steps=2).images
    assert image.size == (64, 64)


def test_padding_changes_nothing(model: Path) -> None:
    pipe = load_pipeline(model)
    call: dict[str, Any] = {"use_resolution_binning": False, "num_inference_steps": 2, "output_type": "latent"}
    short, long = (
        pipe("an octopus on blue", max_sequence_length=n, generator=torch.Generator().manual_seed(0), **call).images
        for n in (TOKENS, 120)
    )
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


def test_a_model_is_measured_and_says_how_it_was_made(model: Path) -> None:
    scenes = load_prompts(model)
    assert len(scenes) == MEASURED.prompts
    result, images = evaluate(model, squares(), MEASURED, scenes)
    assert images.shape == (MEASURED.prompts, 3, 64, 64)
    assert torch.equal(images, sample(load_pipeline(model), [scene.prompt for scene in scenes], MEASURED))
    record = json.loads((model / "PROVENANCE.json").read_text())
    assert record["evaluation"] == {**dataclasses.asdict(MEASURED), **dataclasses.asdict(result)}
    assert record["training"]["denoiser"]["steps"] == STEPS
    card = (model / "README.md").read_text()
    assert str(result.drawn.background) in card
    for text in (*model.rglob("*.json"), *model.rglob("*.md")):
        assert not any(root in text.read_text() for root in ("/tmp", "/work", "/root", "/home"))


@pytest.mark.parametrize("damage", [{"arrangement": 99}, {"emoji": [0, 0]}, {"emoji": [True]}, {"prompt": "a cat"}])
def test_damaged_prompts_are_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    row = {"prompt": "an octopus on blue", "arrangement": 0, "emoji": [0], "background": 0}
    path = tmp_path / PROMPTS
    path.write_text(json.dumps({"version": 1, "prompts": [row]}))
    assert load_prompts(tmp_path) == [Scene(0, (0,), 0)]
    path.write_text(json.dumps({"version": 1, "prompts": [row | damage]}))
    with pytest.raises(TrainingError, match="does not fit"):
        load_prompts(tmp_path)
    path.write_text(json.dumps({"version": 2, "prompts": [row]}))
    with pytest.raises(TrainingError, match="version"):
        load_prompts(tmp_path)


def test_a_damaged_classifier_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"version": 1, "channels": 7}')
    with pytest.raises(TrainingError, match="multiple of 8"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text((model / "classifier" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"model\.safetensors"):
        load_classifier(tmp_path)


class Seer(EmojiClassifier):
    """A classifier that says what it was told about the pictures, whatever they show."""

    def __init__(self, cells: torch.Tensor, backgrounds: list[int]) -> None:
        super().__init__(8)
        self.told = torch.nn.functional.one_hot(cells, len(EMOJI) + 1).permute(0, 3, 1, 2).float()
        self.backgrounds = torch.nn.functional.one_hot(torch.tensor(backgrounds), len(COLOURS)).float()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(images) == len(self.told)
        return self.told, self.backgrounds


def test_judging_finds_what_is_asked_for_and_nothing_else() -> None:
    left_of = next(i for i, a in enumerate(ARRANGEMENTS) if a.text == "{0} left of {1}")
    shown = [Scene(left_of, (0, 1), 4)] * 20
    pictures = draw(shown, squares(), stream(0, Use.HELD_OUT))
    seer = Seer(cell_labels(pictures), [4] * 20)

    def values(asked: Scene) -> tuple[float, ...]:
        judgement = judge(seer, pictures.images, [asked] * 20)
        return tuple(column.value for column in vars(judgement).values())

    assert values(Scene(left_of, (0, 1), 4)) == (1.0, 1.0, 1.0, 1.0)
    assert values(Scene(left_of, (0, 1), 5)) == (1.0, 1.0, 0.0, 0.0)
    assert values(Scene(left_of, (1, 0), 4)) == (1.0, 0.0, 1.0, 0.0)
    assert values(Scene(left_of, (0, 2), 4)) == (0.0, 0.0, 1.0, 0.0)
    single = next(i for i, a in enumerate(ARRANGEMENTS) if a.text == "{0} at the left")
    assert values(Scene(single, (0,), 4)) == (0.0, 1.0, 1.0, 0.0)  # one more than asked for


def test_intervals_are_those_of_wilson() -> None:
    none, half = share([False] * 10), share([True, False] * 50)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.2775, abs=1e-4)
    assert (half.low, half.high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    with pytest.raises(ValueError, match="no prompts"):
        share([])


def test_prompts_name_everything_in_known_words() -> None:
    assert len(set(EMOJI)) == 100
    tokenizer = build_tokenizer()
    unknown, longest = tokenizer.unk_token_id, 0
    for index in range(len(ARRANGEMENTS)):
        count = len(ARRANGEMENTS[index].anchors)
        for first in range(len(EMOJI)):
            emoji = tuple((first + offset) % len(EMOJI) for offset in range(count))
            scene = Scene(index, emoji, first % len(COLOURS))
            assert scene.is_valid()
            tokens, mask = tokenize(tokenizer, [scene.prompt])
            assert unknown not in tokens
            longest = max(longest, int(mask.sum()))
            assert int(mask.sum()) == len(scene.prompt.split()) + 1  # one per word, and the end
    by_words = sorted(range(len(EMOJI)), key=lambda i: -len(Scene(0, (i,), 0).prompt.split()))
    worst = max((Scene(i, tuple(by_words[:3]), 0).prompt for i in range(14, 18)), key=lambda p: len(p.split()))
    assert len(worst.split()) + 1 <= TOKENS
    assert Scene(12, (1, 0), 0).prompt == "a red heart above an octopus on blue"
    with pytest.raises(ValueError, match="tokens"):
        tokenize(tokenizer, ["a " * 30])


def test_drawn_pictures_show_their_scenes() -> None:
    pictures = fresh_pictures(50, squares(8), stream(0, Use.HELD_OUT))
    assert float(pictures.images.min()) >= 0.0
    assert float(pictures.images.max()) <= 1.0
    for scene, image, centres in zip(pictures.scenes, pictures.images, pictures.centres, strict=True):
        for emoji, (x, y), anchor in zip(scene.emoji, centres, ARRANGEMENTS[scene.arrangement].anchors, strict=True):
            colour = torch.tensor([emoji % 2, (emoji // 2) % 2, (emoji // 4) % 2], dtype=torch.float32)
            assert torch.equal(image[:, int(y), int(x)], colour)
            assert math.dist((x, y), anchor) <= 8.0
        assert len(set(scene.emoji)) == len(scene.emoji)
    again = fresh_pictures(50, squares(8), stream(0, Use.HELD_OUT))
    assert torch.equal(again.images, pictures.images)
    assert not torch.equal(fresh_pictures(50, squares(8), stream(0, Use.HELD_OUT, 1)).images, pictures.images)


def test_emoji_that_do_not_stand_out_are_not_asked_for() -> None:
    visible = np.zeros((8, len(COLOURS)), np.bool_)
    visible[2:6, 3] = visible[5, 7] = True
    rng = np.random.default_rng(0)
    scenes = [draw_scene(visible, rng) for _ in range(200)]
    assert all(visible[list(scene.emoji), scene.background].all() for scene in scenes)
    assert {scene.background for scene in scenes} == {3, 7}


def test_the_font_draws_all_emoji() -> None:
    try:
        font = find_font()
    except TrainingError as error:
        pytest.skip(str(error))
    glyphs = load_glyphs(font, len(EMOJI), range(24, 25))
    sprites = np.stack([sizes[24] for sizes in glyphs.sprites])
    assert sprites.shape == (100, 24, 24, 4)
    assert len({sprite.tobytes() for sprite in sprites}) == 100
    assert (sprites[..., :3] <= sprites[..., 3:] + 1e-5).all()  # multiplied by alpha
    heart = EMOJI.index("red heart")
    assert sprites[heart, 12, 12, 0] > 0.8
    assert sprites[heart, 12, 12, 1:3].max() < 0.4
    assert not glyphs.visible[heart, COLOURS.index("red")]
    assert glyphs.visible[heart, COLOURS.index("blue")]
    assert glyphs.visible.mean() > 0.9


def test_a_missing_font_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no font"):
        find_font(tmp_path / "none.ttf")
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(TrainingError, match=r"text\.ttf"):
        load_glyphs(tmp_path / "text.ttf", 3, SIZES)


def test_the_command_stops_at_sigterm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stopped(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert arguments[-1].stop.wait(10.0)
        raise StoppedError("stopped after 0 steps")

    monkeypatch.setattr(command_line, "find_font", lambda path: path)
    monkeypatch.setattr(command_line, "load_glyphs", lambda *_: squares())
    monkeypatch.setattr(command_line, "train", stopped)
    try:
        with pytest.raises(SystemExit, match="resumes"):
            command_line.main(["train", "--quick", "--work", str(tmp_path)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_configurations_that_cannot_train_are_refused() -> None:
    with pytest.raises(ValueError, match="emoji"):
        EmojiConfig(emoji=2)
    with pytest.raises(ValueError, match="heads"):
        EmojiConfig(heads=0)
    with pytest.raises(ValueError, match="prompts"):
        EvaluationConfig(prompts=0)
