"""Parity: verifies the compiled model against the reference, step by step and image by image.

In: a model or a pipeline, a schedule, and the arguments of a run. Out: a `ParityReport`, or a `ParityError` that names
the first step and site that differ.

Hazard: a tolerance that is guessed lets errors pass, and a truth that shares the rounding of what it judges hides them.
So the reference also runs in the next higher precision, from the model as it is at each call.

Reading order: `verify` (the runs), `lockstep` (each call, side by side), `divergence` (where they differ), `tolerance`
(what is allowed), `higher` and `promoted` (the next higher precision), `report`.
"""
