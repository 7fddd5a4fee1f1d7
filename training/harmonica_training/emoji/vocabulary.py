"""The tokenizer: T5's, with one token per word of the prompts."""

import torch
from torch import Tensor
from transformers import BatchEncoding, T5Tokenizer

from harmonica_training.emoji.scenes import every_word

TOKENS = 20  # of the longest prompt, its end included
_SPACE = "\u2581"  # T5 marks the beginning of a word with it
# an unknown word costs more than any known one, and single letters are not known
_SCORES = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, _SPACE: -20.0}


def build_tokenizer() -> T5Tokenizer:
    """The tokenizer of all prompts; other words are unknown to it, and all alike."""
    vocabulary = [*_SCORES.items(), *((_SPACE + word, -1.0) for word in every_word())]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def tokenize(tokenizer: T5Tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token numbers and mask, both int64 [B, 20].

    Raises:
        ValueError: a prompt is longer.
    """
    encoded: BatchEncoding = tokenizer(prompts, padding="max_length", max_length=TOKENS)
    for prompt, tokens in zip(prompts, encoded["input_ids"], strict=True):
        if len(tokens) > TOKENS:
            raise ValueError(f"a prompt may have {TOKENS} tokens, got {len(tokens)} of {prompt!r}")
    return torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])
