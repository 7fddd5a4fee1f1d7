"""Says what a training generates: class labels, prompts, or embeddings; no images."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from harmonica_rt.schedule.files import write_atomically
from harmonica_rt.untrusted.text import one_line, quoted
from harmonica_training import safetensors_file
from harmonica_training.errors import TrainingError
from harmonica_training.prompt_encoder import PromptEncoder, call_parameters

_VERSION = "harmonica_embeddings_version"  # keys of the metadata in a file of embeddings
_ABSENT = "absent"


class Conditions(Protocol):
    """What to generate: arguments of the pipeline's call for chosen entries."""

    def __len__(self) -> int:
        """The number of entries to choose from."""

    def arguments(self, chosen: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call for a batch of the `chosen` entries, in their order."""

    def describe(self) -> dict[str, object]:
        """A provenance record in plain JSON: kind, count, and a SHA-256 of the content."""


def draw(conditions: Conditions, seed: int, iteration: int, samples: Sequence[int]) -> list[int]:
    """The entry for each sample of an iteration, drawn uniformly and with replacement.

    An entry depends only on (seed, iteration, sample): however the samples of an iteration are split over processes,
    they get the same entries, in every training.

    Args:
        conditions: what to draw from.
        seed: the seed of the training.
        iteration: number of the iteration.
        samples: global indices of the samples in the iteration's batch.
    """
    keys = (f"condition {seed} {iteration} {sample}".encode() for sample in samples)
    return [int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % len(conditions) for key in keys]


class ClassLabels:
    """Class labels, as `DiTPipeline` takes them.

    Args:
        labels: the classes to draw from; a class given twice is drawn twice as often.

    Raises:
        TrainingError: there are no labels, or one is negative.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = tuple(operator.index(label) for label in labels)
        if not self.labels or min(self.labels) < 0:
            raise TrainingError(f"expected one or more class labels, 0 or larger; got {list(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels)

    def arguments(self, chosen: Sequence[int]) -> dict[str, Any]:
        """`class_labels` for the chosen entries."""
        return {"class_labels": [self.labels[index] for index in _checked(chosen, len(self))]}

    def describe(self) -> dict[str, object]:
        """Kind, count and SHA-256."""
        digest = hashlib.sha256(repr(self.labels).encode()).hexdigest()
        return {"kind": "class labels", "count": len(self), "sha256": digest}


def class_labels(pipeline: Any) -> ClassLabels:
    """All classes of a pipeline: those it has names for, else all that its transformer has an embedding for.

    The null class of guidance comes after those of `num_embeds_ada_norm`, and is left out.

    Raises:
        TrainingError: the pipeline does not take class labels, or does not say which ones it knows.
    """
    name = type(pipeline).__name__
    if "class_labels" not in call_parameters(type(pipeline)):
        raise TrainingError(f"{name} takes no class labels; give prompts or embeddings")
    config = getattr(getattr(pipeline, "transformer", None), "config", None)
    count = getattr(config, "num_embeds_ada_norm", None)
    named = sorted(set((getattr(pipeline, "labels", None) or {}).values()))
    labels = named or list(range(count or 0))
    if not labels:
        raise TrainingError(f"{name} does not say which classes it knows; give them: ClassLabels([...])")
    return ClassLabels([label for label in labels if count is None or label < count])


class Embeddings:
    """Embeddings, named like the arguments of the pipeline's call.

    Args:
        tensors: `[N, ...]` each, on the device of the pipeline: prompt_embeds, prompt_attention_mask, ...
        absent: arguments of the call to pass as None, because their default is text.

    Raises:
        TrainingError: there are no tensors, or their N differ.
    """

    def __init__(self, tensors: Mapping[str, Tensor], absent: Sequence[str] = ()) -> None:
        self.tensors = dict(tensors)
        self.absent = tuple(absent)
        counts = {name: len(tensor) if tensor.ndim else 0 for name, tensor in self.tensors.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise TrainingError(
                f"expected embeddings [N, ...] with the same N, at least 1, under all names; got N = {quoted(counts)}"
            )
        self._count = next(iter(counts.values()))

    def __len__(self) -> int:
        return self._count

    def arguments(self, chosen: Sequence[int]) -> dict[str, Any]:
        """The chosen entries of every tensor, `[len(chosen), ...]`, on its device."""
        entries = torch.tensor(_checked(chosen, len(self)), dtype=torch.int64)
        picked = {name: tensor.index_select(0, entries.to(tensor.device)) for name, tensor in self.tensors.items()}
        return {**picked, **dict.fromkeys(self.absent)}

    def describe(self) -> dict[str, object]:
        """Kind, count, shape of one entry by name, and SHA-256 of names, dtypes, shapes and values."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
        shapes = {name: list(tensor.shape[1:]) for name, tensor in self.tensors.items()}
        return {"kind": "embeddings", "count": len(self), "shapes": shapes, "sha256": digest.hexdigest()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save

        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # the file shares no memory
            for name, tensor in self.tensors.items()
        }
        write_atomically(path, save(tensors, metadata={_VERSION: "1", _ABSENT: ",".join(self.absent)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Embeddings:
        """Read what `save` wrote, or any safetensors file of embeddings named as the pipeline's call names them.

        Raises:
            TrainingError: the file is missing, is not a safetensors file, has another version, or its embeddings are
                not [N, ...] with one common N and finite numbers.
        """
        source = os.fspath(path)
        try:
            tensors, metadata = safetensors_file.read(source, device)
        except (FileNotFoundError, safetensors_file.UnreadableError) as error:
            raise TrainingError(f"cannot read embeddings from {source}: {error}") from error
        ours = _VERSION in metadata
        if ours and metadata[_VERSION] != "1":
            raise TrainingError(f"{source} holds embeddings of version {one_line(metadata[_VERSION])}, expected 1")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise TrainingError(f"{source}: {one_line(name)} holds numbers that are not finite")
        try:
            return cls(tensors, [name for name in metadata.get(_ABSENT, "").split(",") if name] if ours else ())
        except TrainingError as error:
            raise TrainingError(f"{source}: {error}") from error


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Prompts of a UTF-8 text file, one per line, without blank lines and surrounding space.

    Raises:
        TrainingError: the file cannot be read, is not UTF-8, or holds no prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TrainingError(f"cannot read prompts from {os.fspath(path)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{os.fspath(path)} is not UTF-8 text: {error}; save it as UTF-8") from error
    except ValueError as error:  # a NUL in the name
        raise TrainingError(f"cannot read prompts from {os.fspath(path)}: {error}") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise TrainingError(f"{os.fspath(path)} holds no prompt; expected one per line")
    return prompts


def encode_prompts(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    guidance: bool,
    negative_prompt: str = "",
    batch: int = 8,
    arguments: Mapping[str, Any] | None = None,
) -> Embeddings:
    """Encode prompts with the pipeline's own `encode_prompt`, as its call would.

    Called with the result, the pipeline gives the same images as when called with the prompts (and with
    `negative_prompt`, and with `clean_caption=False` if it has that): bit for bit if the prompts were encoded in the
    same batch, else up to the different rounding of the text encoder in another batch.

    Args:
        pipeline: a diffusers pipeline with its text encoders.
        prompts: one or more prompts.
        guidance: also encode `negative_prompt`; runs must use guidance if this is set, and must not otherwise.
        negative_prompt: what to guide away from.
        batch: how many prompts to encode at once.
        arguments: arguments of the pipeline's call; those that `encode_prompt` takes are used: max_sequence_length, ...

    Raises:
        TrainingError: the pipeline's `encode_prompt` cannot be used without knowledge of the pipeline (then encode the
            prompts by hand and pass `Embeddings`), or prompts of different batches have embeddings of different
            lengths.
    """
    if not prompts or isinstance(prompts, str) or batch < 1:
        raise TrainingError(f"expected a list of prompts and a batch of 1 or more; got {prompts!r} and {batch}")
    encoder = PromptEncoder(pipeline, guidance=guidance, arguments=arguments or {})
    batches = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    encoded = [encoder.encode(words, negative_prompt) for words in batches]
    names = dict.fromkeys(name for outputs in encoded for name in outputs)
    return Embeddings(
        {name: _joined(name, [outputs.get(name) for outputs in encoded]) for name in names}, encoder.absent
    )


def _joined(name: str, values: Sequence[Tensor | None]) -> Tensor:
    tensors = [value for value in values if value is not None]
    shapes = sorted({tuple(tensor.shape[1:]) for tensor in tensors})
    if len(shapes) > 1 or len(tensors) < len(values):
        raise TrainingError(
            f"{name} of one batch of prompts is not like that of another: shapes {shapes} per prompt"
            f"{', or none' if len(tensors) < len(values) else ''}; encode with a fixed length, or all in one batch"
        )
    return torch.cat(tensors)


def _checked(chosen: Sequence[int], count: int) -> list[int]:
    wrong = [index for index in chosen if not 0 <= index < count]
    if wrong:
        raise IndexError(f"there are {count} conditions, 0 to {count - 1}; got {wrong}")
    return list(chosen)
