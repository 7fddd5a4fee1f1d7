"""Call: the arguments of one denoiser call, normalised, and what each of them is to a run.

In: positional and keyword arguments as pipelines pass them, and the model's own signature. Out: a `Call` with its
leaves, their `Signature` (tree, shapes, strides, dtypes, devices, plain values) and a `Role` per leaf: latents,
timestep, request.

Hazard: calls that differ in anything a graph bakes in must differ in their signatures, or one runs the other's plan.

Reading order: `call`, `roles`.
"""
