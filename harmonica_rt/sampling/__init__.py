"""Sampling: assigns each call of a denoiser to a step and a stream of a run.

In: calls of a denoiser, and the events of its schedulers. Out: the result of each call, from an engine's stream at the
step that the call belongs to, or from the plain model if the call belongs to no run.

Hazard: nothing in a call says which step it is in, or who made it. Calls are not steps, callbacks call the model too,
and runs are abandoned midway. A call that cannot be placed with certainty is computed in full or raises an error.

Reading order: `denoiser` (what is called), `finding` (which pipeline calls it), `session` (which run), `scheduler` and
`following` (what schedulers report), `step_count` (which step), `origin` (who makes the call), `run` (which stream),
`conditioning` (whether its request changed).
"""
