"""A package that is not installed is named, with the extra that brings it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.running import run
from tests.tiny import pixart_from_words, saved_and_loaded

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
