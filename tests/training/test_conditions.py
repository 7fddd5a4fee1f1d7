"""Conditions: what they draw, what they refuse, and that embeddings give the images of their words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from harmonica_rt.demo import bundled_model
from harmonica_training.conditions import (
    ClassLabels,
    Conditions,
    Embeddings,
    class_labels,
    draw,
    encode_prompts,
    read_prompts,
)
from harmonica_training.errors import TrainingError
from harmonica_training.prompt_encoder import encoded_names
from tests import tiny

WORDS = ["<pad>", "</s>", "<unk>", "a", "the", "small", "cat", "on", "moon", "dog"]
PROMPTS = ["a small cat", "the moon", "a dog on the moon", "the dog"]
SMALL = {"height": 8, "width": 8}


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=8, **special)


def t5() -> Any:
    config = T5Config(vocab_size=len(WORDS), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return tiny.randomised(T5EncoderModel(config))


def clip(model: type, width: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    return tiny.randomised(model(config))


def pixart() -> Any:
    return tiny.pixart_from_words()


def sd3() -> Any:
    """Its two CLIP encoders lie side by side in the widths of its transformer."""
    pipeline = tiny.sd3()
    return d.StableDiffusion3Pipeline(
        **{
            **pipeline.components,
            "text_encoder": clip(CLIPTextModelWithProjection, 5),
            "text_encoder_2": clip(CLIPTextModelWithProjection, 5),
            "text_encoder_3": t5(),
            **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), tokenizer()),
        }
    )


def flux() -> Any:
    parts = {"text_encoder": clip(CLIPTextModel, 10), "text_encoder_2": t5()}
    return d.FluxPipeline(**{**tiny.flux().components, **parts, "tokenizer": tokenizer(), "tokenizer_2": tokenizer()})


FIXED = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16}
CASES = [  # pipeline, guidance, arguments of every call
    pytest.param(pixart, True, {**FIXED, "guidance_scale": 4.5}, id="pixart-guided"),
    pytest.param(pixart, False, {**FIXED, "guidance_scale": 1.0}, id="pixart", marks=pytest.mark.exhaustive),
    pytest.param(
        sd3, True, {"guidance_scale": 4.0, "max_sequence_length": 16}, id="sd3-guided", marks=pytest.mark.exhaustive
    ),
    pytest.param(sd3, False, {"guidance_scale": 0.0, "max_sequence_length": 16}, id="sd3"),
    pytest.param(flux, True, {"true_cfg_scale": 2.0, "max_sequence_length": 16}, id="flux-guided"),
    pytest.param(flux, False, {"max_sequence_length": 16}, id="flux", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("build", "guidance", "arguments"), CASES)
def test_embeddings_give_the_images_of_their_words(build: Any, guidance: bool, arguments: dict[str, Any]) -> None:
    pipeline, call = build(), {**SMALL, **arguments}
    pipeline.set_progress_bar_config(disable=True)
    negative = {"negative_prompt": ["a dog"] * 2} if guidance else {}
    encoded = encode_prompts(pipeline, PROMPTS, guidance=guidance, negative_prompt="a dog", batch=2, arguments=call)
    assert len(encoded) == len(PROMPTS) == 4
    assert not any(tensor.requires_grad for tensor in encoded.tensors.values())
    images = []
    for batch in ([0, 1], [2, 3]):  # an encoder may round a prompt otherwise in another batch
        images.append(tiny.sample(pipeline, 2, **encoded.arguments(batch), **call))
        words = [PROMPTS[index] for index in batch]
        assert np.array_equal(images[-1], tiny.sample(pipeline, 2, prompt=words, **negative, **call))
    mixed = tiny.sample(pipeline, 2, **encoded.arguments([2, 1]), **call)
    assert np.array_equal(mixed, np.stack([images[1][0], images[0][1]]))  # the noise goes with the place in the batch


def test_saved_embeddings_are_the_same_arguments(tmp_path: Path) -> None:
    encoded = encode_prompts(pixart(), PROMPTS, guidance=True)
    encoded.save(tmp_path / "prompts.safetensors")
    loaded = Embeddings.load(tmp_path / "prompts.safetensors")
    expected, got = encoded.arguments([1, 1, 2]), loaded.arguments([1, 1, 2])
    assert got.pop("negative_prompt") is expected.pop("negative_prompt") is None
    assert set(got) == {f"{sign}prompt_{kind}" for sign in ("", "negative_") for kind in ("embeds", "attention_mask")}
    assert all(torch.equal(got[name], expected[name]) and got[name].dtype == expected[name].dtype for name in got)
    assert loaded.describe() == encoded.describe()
    assert encoded.describe() != encode_prompts(pixart(), PROMPTS[::-1], guidance=True).describe()


def test_a_file_of_another_maker_is_read_and_a_wrong_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    save_file({"prompt_embeds": torch.ones(2, 3, dtype=torch.bfloat16)}, path, metadata={"absent": "height"})
    loaded = Embeddings.load(path)
    assert list(loaded.arguments([1])) == ["prompt_embeds"]
    assert json.loads(json.dumps(loaded.describe())) == loaded.describe()
    save_file({"prompt_embeds": torch.ones(2, 3)}, path, metadata={"harmonica_embeddings_version": "2"})
    with pytest.raises(TrainingError, match="version 2, expected 1"):
        Embeddings.load(path)
    path.write_bytes(b"no such format")
    with pytest.raises(TrainingError, match="cannot read embeddings"):
        Embeddings.load(path)
    with pytest.raises(TrainingError, match="cannot read embeddings"):
        Embeddings.load(tmp_path / "missing")


def test_embeddings_must_be_of_one_length() -> None:
    for tensors in (
        {},
        {"prompt_embeds": torch.ones(0, 4)},
        {"prompt_embeds": torch.ones(3, 4), "pooled_prompt_embeds": torch.ones(2, 4)},
    ):
        with pytest.raises(TrainingError, match="with the same N"):
            Embeddings(tensors)
    with pytest.raises(IndexError, match="0 to 2; got \\[3, -1\\]"):
        Embeddings({"prompt_embeds": torch.ones(3, 4)}).arguments([0, 3, -1])


class Standin:
    """What a pipeline class needs to be encoded with."""

    components: dict[str, Any] = {}  # noqa: RUF012 - a stand-in
    _execution_device = "cpu"

    def __call__(self, prompt: Any = None, negative_prompt: Any = None, prompt_embeds: Any = None) -> None: ...


class Uneven(Standin):
    def encode_prompt(self, prompt: list[str]) -> torch.Tensor:
        prompt_embeds = torch.ones(len(prompt), max(map(len, prompt)), 4)
        return prompt_embeds


class Transposed(Standin):
    def encode_prompt(self, prompt: list[str]) -> torch.Tensor:
        prompt_embeds = torch.ones(5, len(prompt), 4)
        return prompt_embeds


class ForgetsTheMask(Standin):
    def encode_prompt(self, prompt: Any, prompt_embeds: Any = None) -> tuple[Any, Any]:
        mask = None if prompt is None else torch.ones(len(prompt), 2)
        prompt_embeds = torch.ones(len(prompt), 2, 4) if prompt_embeds is None else prompt_embeds
        return prompt_embeds, mask


class Unnamed(Standin):
    def encode_prompt(self, prompt: list[str]) -> Any:
        return self._pair(prompt)[0]


class Compiled(Standin):
    exec("def encode_prompt(self, prompt):\n    return prompt_embeds")


class NeedsMore(Standin):
    def encode_prompt(self, prompt: list[str], image: Any) -> Any:
        prompt_embeds = image
        return prompt_embeds


@pytest.mark.parametrize(
    ("pipeline", "guidance", "message"),
    [
        (Uneven, False, r"shapes \[\(5, 4\), \(9, 4\)\] per prompt; encode with a fixed length, or all in one batch"),
        (Uneven, True, "takes a negative prompt in words only"),
        (Transposed, False, r"encodes 1 prompts to prompt_embeds of shape \[5, 1, 4\]"),
        (ForgetsTheMask, False, "neither takes mask in its call nor recreates it"),
        (Unnamed, False, "return statements name different values"),
        (Compiled, False, "source cannot be read"),
        (NeedsMore, False, "also needs image"),
        (tiny.dit, False, "has no encode_prompt"),
        (tiny.flux, False, "without its text encoders"),
    ],
)
def test_what_cannot_be_encoded_says_why(pipeline: Any, guidance: bool, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        encode_prompts(pipeline(), ["a cat", "the small"], guidance=guidance, batch=1)


def test_arguments_must_be_known_and_no_words() -> None:
    with pytest.raises(TrainingError, match="takes no argument max_length"):
        encode_prompts(pixart(), PROMPTS, guidance=False, arguments={"max_length": 8})
    with pytest.raises(TrainingError, match="negative_prompt cannot be among the arguments"):
        encode_prompts(pixart(), PROMPTS, guidance=True, arguments={"negative_prompt": "a dog"})
    with pytest.raises(TrainingError, match="expected a list of prompts"):
        encode_prompts(pixart(), "a cat", guidance=False)


NAMES = {
    d.StableDiffusionPipeline: "prompt_embeds negative_prompt_embeds",
    d.FluxPipeline: "prompt_embeds pooled_prompt_embeds text_ids",
    d.QwenImagePipeline: "prompt_embeds prompt_embeds_mask",
    d.SanaPipeline: "prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask",
    d.PRXPipeline: "prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask",
    d.LongCatImagePipeline: "prompt_embeds text_ids",
}


@pytest.mark.parametrize("pipeline_class", NAMES, ids=lambda kind: kind.__name__)
def test_names_are_read_from_the_source(pipeline_class: type) -> None:
    assert encoded_names(pipeline_class) == tuple(NAMES[pipeline_class].split())


@pytest.mark.parametrize("name", ["HunyuanDiTPipeline", "LattePipeline", "Kandinsky5T2IPipeline", "BriaFiboPipeline"])
def test_pipelines_out_of_reach_ask_for_embeddings(name: str) -> None:
    with pytest.raises(TrainingError, match=f"{name} .*give embeddings"):
        encoded_names(getattr(d, name))


def test_class_labels_are_those_of_the_pipeline() -> None:
    bundled = class_labels(d.DiTPipeline.from_pretrained(bundled_model()))
    assert bundled.labels == tuple(range(10))
    assert bundled.arguments([3, 0, 3]) == {"class_labels": [3, 0, 3]}
    unnamed = class_labels(tiny.dit())
    assert (len(unnamed), max(unnamed.labels)) == (1000, 999)
    with_null = tiny.dit()
    with_null.labels = {"none": 1000, "tench": 0, "goldfish": 1, "carp": 1}
    assert class_labels(with_null).labels == (0, 1)
    assert unnamed.describe()["count"] == 1000
    assert unnamed.describe()["sha256"] != bundled.describe()["sha256"]
    with pytest.raises(TrainingError, match="takes no class labels"):
        class_labels(tiny.flux())
    for wrong in ([], [3, -1]):
        with pytest.raises(TrainingError, match="0 or larger"):
            ClassLabels(wrong)


def test_draws_do_not_depend_on_the_split_over_processes_or_on_the_run() -> None:
    conditions: Conditions = ClassLabels(range(10))
    whole = draw(conditions, 7, 3, range(8))
    assert draw(conditions, 7, 3, [0, 2, 4, 6]) + draw(conditions, 7, 3, [1, 3, 5, 7]) == whole[::2] + whole[1::2]
    assert draw(conditions, 8, 3, range(8)) != whole != draw(conditions, 7, 4, range(8))
    code = "from harmonica_training.conditions import *; print(draw(ClassLabels(range(10)), 7, 3, range(8)))"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(fresh) == whole
    counts = np.bincount([draw(conditions, 0, iteration, [0])[0] for iteration in range(2000)], minlength=10)
    assert counts.min() > 140  # 200 expected; less than this once in a million seeds
    assert counts.max() < 270


def test_prompts_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  the moon, \u2028 seen \t\n   \nein Hund über dem Mond".encode())
    assert read_prompts(path) == ["a cat", "the moon, \u2028 seen", "ein Hund über dem Mond"]
    path.write_text(" \n\n")
    with pytest.raises(TrainingError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes("über".encode("latin-1"))
    with pytest.raises(TrainingError, match="not UTF-8"):
        read_prompts(path)
    with pytest.raises(TrainingError, match="cannot read prompts"):
        read_prompts(tmp_path / "missing")
