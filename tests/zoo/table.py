"""The zoo: every transformer class that diffusers exports, one entry each."""

from __future__ import annotations

import inspect

import diffusers

from tests.zoo.entry import Entry
from tests.zoo.images import IMAGES
from tests.zoo.others import OTHERS
from tests.zoo.videos import VIDEOS

ZOO: dict[str, Entry] = dict(sorted({**IMAGES, **VIDEOS, **OTHERS}.items()))

REPRESENTATIVES = {
    "DiTTransformer2DModel": "class labels, adaLN-Zero",
    "PixArtTransformer2DModel": "self- and cross-attention, one modulation for all blocks",
    "BriaFiboTransformer2DModel": "double and single blocks; a list of tensors as an argument",
    "CogVideoXTransformer3DModel": "video",
    "StableAudioDiTModel": "audio",
    "ErnieImageTransformer2DModel": "a plan that no file can hold: a value that cannot be saved",
    "GlmImageTransformer2DModel": "a plan that no file can hold: a size that depends on values",
    "OmniGenTransformer2DModel": "a plan that no file can hold: it is for some values of the request",
}
"""One class for each way in which classes differ for capture, for lowering or for plan files."""

NO_DENOISER = {
    "HunyuanDiT2DControlNetModel": "a ControlNet: its outputs feed a transformer's blocks",
    "HunyuanDiT2DMultiControlNetModel": "a ControlNet: its outputs feed a transformer's blocks",
    "LongCatAudioDiTVae": "an autoencoder",
    "MiniMaxMusic3RVQDepthDecoder": "decodes tokens one after the other, without timesteps",
}


def exported() -> list[str]:
    """Classes of models exported by diffusers that are transformers by their names or by where they are defined."""
    found = []
    for name in sorted({*dir(diffusers)} & {*dir(diffusers.models)}):
        value = getattr(diffusers.models, name)
        if not (inspect.isclass(value) and issubclass(value, diffusers.ModelMixin)):
            continue
        if "Transformer" in name or "DiT" in name or ".transformers." in value.__module__:
            found.append(name)
    return found
