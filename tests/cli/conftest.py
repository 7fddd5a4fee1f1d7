"""Small models on disk, and a schedule for one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import STEPS, run
from tests.tiny import dit, saved_and_loaded
from tests.training.small import dit as dit_of_ten_classes


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of two blocks, four sites."""
    path = tmp_path_factory.mktemp("dit")
    saved_and_loaded(dit, path)
    return path


@pytest.fixture
def schedule(model: Path, tmp_path: Path) -> Path:
    """A schedule for `model` that reuses half of all entries."""
    path = tmp_path / "schedule.json"
    assert run("schedule", "make", model, path, "--steps", STEPS, "--random", "0.5").exit_code == 0
    return path


@pytest.fixture(scope="session")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of three blocks, six sites, with a label for each of its ten classes."""
    path = tmp_path_factory.mktemp("ten_classes")
    dit_of_ten_classes(layers=3).save_pretrained(path)
    return path
