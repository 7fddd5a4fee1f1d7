"""Pipelines: put a denoiser under a schedule into a diffusers pipeline, and take it out again.

In: a pipeline and a `Denoiser`. Out: the pipeline's own module with its call taken over, its scheduler followed.

Hazard: pipelines share modules and schedulers, and users assign others. The module keeps its class, attributes and
weights; only its call is replaced, where `nn.Module.compile` puts one.

Reading order: `install`, `denoiser` (a compiled model that was assigned to a pipeline), `fit` (does a schedule fit
it?).
"""
