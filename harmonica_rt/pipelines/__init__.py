"""Pipelines: put a denoiser under a schedule into a diffusers pipeline, and remove it again.

In: a pipeline and a `Denoiser`. Out: the pipeline's own module, with its call replaced and its scheduler followed.

Hazard: pipelines share modules and schedulers, and users assign others. The module keeps its class, attributes and
parameters; only its call is replaced, in the attribute that `nn.Module.compile` uses.

Reading order: `install`, `denoiser` (a compiled model assigned to a pipeline), `fit` (does a schedule fit?).
"""
