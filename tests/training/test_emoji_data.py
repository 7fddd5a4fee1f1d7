"""The data of the emoji model: prompts, pictures, and the judgement of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the emoji model is a diffusers pipeline")
pytest.importorskip("transformers", reason="its prompts have a T5 encoder")

from harmonica_training.emoji import EmojiClassifier, Scene, find_font, judge, load_glyphs, load_prompts
from harmonica_training.emoji.classifier import cell_labels
from harmonica_training.emoji.drawing import draw, fresh_pictures
from harmonica_training.emoji.evaluate import PROMPTS
from harmonica_training.emoji.judging import share
from harmonica_training.emoji.names import COLOURS, EMOJI
from harmonica_training.emoji.scenes import ARRANGEMENTS, SIZES, draw_scene
from harmonica_training.emoji.streams import Use, stream
from harmonica_training.emoji.vocabulary import TOKENS, build_tokenizer, tokenize
from harmonica_training.errors import TrainingError
from tests.training.emoji_squares import colour_of, squares


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
            colour = torch.tensor(colour_of(emoji), dtype=torch.float32)
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
