"""Sampling: calls as they come -> (step, stream) of a run.

In: calls of a denoiser, and what its schedulers do. Out: each call answered by an engine's stream in the step that it
belongs to, or by the plain model where it belongs to no run.

Hazard: nothing in a call says which step it is, or whose. Calls are not steps, callbacks call too, runs are broken
off. What cannot be told for certain is computed in full, or is an error.

Reading order: `denoiser` (what is called), `finding` (by which pipeline), `session` (which run), `scheduler` and
`following` (what schedulers tell), `step_count` (which step), `origin` (whose call), `run` (which stream),
`conditioning` (whether its request changed).
"""
