"""SD3 and Flux with one block of each kind, and changes made to both pipelines of a pair.

These tests compile a pipeline again and again. What they test depends on how blocks differ, not on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.tiny import Family, families, randomised
from tests.truth import Pair


def _shallow(family: Family, **layers: int) -> Family:
    """The family with other numbers of layers in its transformer."""

    def build() -> Any:
        pipeline = family.build()
        model = pipeline.transformer
        pipeline.transformer = randomised(type(model).from_config({**model.config, **layers}))
        return pipeline

    return replace(family, build=build)


SD3 = _shallow(families()["sd3"], num_layers=2)  # a block of dual attention, and the last one, without text outputs
FLUX = _shallow(families()["flux"], num_layers=1, num_single_layers=1)


def change(made: Pair, what: Callable[[Any], object]) -> None:
    """Do the same to the plain and to the compiled pipeline."""
    for pipeline in (made.plain, made.compiled):
        what(pipeline)
