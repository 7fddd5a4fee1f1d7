"""Other methods, which learned schedules are compared with.

In: the site costs of a model and a theoretical speed-up; for `calibrate` also uncached runs, for Learning-to-Cache
images. Out: a `Schedule` from `fora`, `random_at` and `SmoothCacheErrors.at_speedup`; a number of steps from
`fewer_steps`; an objective for `train` from `learning_to_cache`.

Hazard: schedules are comparable only at equal theoretical speed-up, and each rule reaches only some speed-ups. So a
rule takes the nearest one, and its schedule records which one that is.

Reading order: `rules` (evenly spaced steps, random entries, fewer steps), `smoothcache`, `learning_to_cache`.
"""

from harmonica_training.baselines.learning_to_cache import LearningToCache, learning_to_cache
from harmonica_training.baselines.rules import fewer_steps, fora, random_at
from harmonica_training.baselines.smoothcache import SmoothCacheErrors, calibrate

__all__ = [
    "LearningToCache",
    "SmoothCacheErrors",
    "calibrate",
    "fewer_steps",
    "fora",
    "learning_to_cache",
    "random_at",
]
