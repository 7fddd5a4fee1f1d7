"""Call: normalises the arguments of a denoiser call, and finds the role of each argument in a run.

In: positional and keyword arguments as pipelines pass them, and the signature of the model's forward. Out: a `Call`
with its leaves, its `Signature` (tree, shapes, strides, dtypes, devices, plain values), and a `Role` per leaf: latents,
timestep or request.

Hazard: calls that differ in anything that a graph bakes in must differ in their signatures, or one would run the
other's plan.

Reading order: `forward_arguments`, `call`, `roles`.
"""
