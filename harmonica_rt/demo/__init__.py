"""The demo: samples a model uncached, with the reference and compiled; compares, measures and draws.

In: a `DiTPipeline` (by default the bundled one), a schedule, a `DemoRequest`. Out: a `DemoResult` and a picture.
Hazard: a speed-up is worth nothing if the images are wrong, and timings on a busy machine drift. So parity is checked
first, and uncached and compiled rounds are timed in turn.

Reading order: `run` (the demo), `measure` (times), `picture` (draws). `digits-dit` is the model, trained by
`harmonica_training.digits`; `demo_pipeline` and `demo_schedule` load it and its schedule.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from harmonica_rt.schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DiTPipeline


def bundled_model() -> Path:
    """Directory of the bundled model, a `DiTPipeline` of handwritten digits."""
    return Path(str(resources.files(__package__) / "digits-dit"))


def bundled_schedule() -> Path:
    """File of the schedule that was learned for the bundled model (20 DDIM steps, guidance 2.0)."""
    return bundled_model() / "schedule.json"


def demo_pipeline() -> DiTPipeline:
    """Load the bundled pipeline, to try things out: it draws digits (classes 0 ... 9, 64 x 64 pixels) on the CPU.

    Nothing is downloaded. `demo_pipeline()([3], num_inference_steps=20, guidance_scale=2.0).images[0]` is a three.
    """
    from diffusers import DiTPipeline

    return DiTPipeline.from_pretrained(bundled_model(), local_files_only=True)


def demo_schedule() -> Schedule:
    """Load the schedule that was learned for `demo_pipeline()`: 20 DDIM steps, guidance 2.0, 1.5 times fewer FLOPs."""
    return Schedule.load(bundled_schedule())
