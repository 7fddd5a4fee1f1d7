"""Settings that two functions read."""

SCALE = 1.0
SHIFT = 0.0
