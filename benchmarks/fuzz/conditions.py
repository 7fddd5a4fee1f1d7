"""Files of embeddings and of prompts, which say what a training generates."""

from __future__ import annotations

from pathlib import Path
from random import Random

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.fuzz.format import Format, garbled
from benchmarks.fuzz.json_damage import ODD_TEXT
from benchmarks.fuzz.safetensors_damage import damaged_safetensors
from harmonica_training import Embeddings, read_prompts
from harmonica_training.errors import TrainingError

_METADATA = {"harmonica_embeddings_version": "1", "absent": "negative_prompt"}


def tensors(rng: Random) -> dict[str, Tensor]:
    """Embeddings of a few prompts."""
    count = rng.randint(1, 3)
    return {"prompt_embeds": torch.ones(count, 4, 8), "prompt_attention_mask": torch.ones(count, 4, dtype=torch.int64)}


def check_embeddings(result: object, path: Path) -> None:
    """Entries can be drawn, and the file is described by its count."""
    assert isinstance(result, Embeddings)
    assert result.describe()["count"] == len(result) >= 1
    assert all(len(values) == 1 for values in result.arguments([0]).values() if values is not None)


def prompts(rng: Random) -> bytes:
    """A few prompts, with blank lines among them."""
    return "\n".join(rng.choice(("a cat", "ein Hund", "\u732b", "", "  x ")) for _ in range(5)).encode() + b"\na\n"


def damaged_prompts(rng: Random) -> bytes:
    """Prompts with odd text among them, in other encodings, or garbled."""
    data = prompts(rng)
    match rng.randrange(4):
        case 0:
            return data + rng.choice(ODD_TEXT).encode("utf-8", "surrogatepass")
        case 1:
            return data.decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
        case 2:
            return rng.choice((b"", b"\n\n", b" \t\n", b"\xff\xfe", b"\xef\xbb\xbf"))
        case _:
            return garbled(rng, data)


def check_prompts(result: object, path: Path) -> None:
    """There is at least one prompt, and none is blank."""
    assert isinstance(result, list)
    assert result
    assert all(prompt.strip() for prompt in result)


EMBEDDINGS = Format(
    name="embeddings",
    file="embeddings.safetensors",
    errors=(TrainingError,),
    valid=lambda rng: safetensors.torch.save(tensors(rng), _METADATA),
    damaged=lambda rng: damaged_safetensors(rng, tensors(rng), _METADATA),
    read=Embeddings.load,
    check=check_embeddings,
)
PROMPTS = Format(
    name="prompts",
    file="prompts.txt",
    errors=(TrainingError,),
    valid=prompts,
    damaged=damaged_prompts,
    read=read_prompts,
    check=check_prompts,
)
