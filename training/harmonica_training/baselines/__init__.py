"""What a learned schedule is compared with: other methods, each a producer of the same `Schedule`.

At a given theoretical speed-up: `SmoothCacheErrors.at_speedup`, `fora`, `random_at`, and no cache but `fewer_steps`.
Learning-to-Cache is an objective for `train`.
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
