"""The demo: the bundled model sampled plain, with the reference and compiled; compared, measured, drawn."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def bundled_model() -> Path:
    """Directory of the bundled model, a `DiTPipeline` of handwritten digits."""
    return Path(str(resources.files(__package__) / "digits-dit"))


def bundled_schedule() -> Path:
    """File of the schedule that was learned for the bundled model (20 DDIM steps, guidance 2.0)."""
    return bundled_model() / "schedule.json"
