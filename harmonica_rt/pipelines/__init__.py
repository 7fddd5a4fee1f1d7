"""Pipelines: put a denoiser under a schedule into a diffusers pipeline, and remove it again.

In: a pipeline and a `Denoiser`. Out: the pipeline's own module, with its call replaced and its scheduler followed.

Hazard: pipelines share modules and schedulers, and users assign others. The module keeps its class, attributes and
parameters; only its call is replaced, in `_compiled_call_impl`, where `nn.Module.compile` puts one too.

Reading order: `install`, `denoiser` (a compiled model that is assigned to a pipeline; the denoiser beneath is that of
`sampling`), `one_run` (a call with another denoiser), `fit` (does a schedule fit the model and the sampler?).
"""
