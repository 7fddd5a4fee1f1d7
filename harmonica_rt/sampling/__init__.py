"""Sampling: assigns each call of a denoiser to a step and a stream of a run.

In: calls of a denoiser, and the events of its schedulers. Out: the result of each call, from an engine's stream at the
step that the call belongs to, or from the plain model if the call belongs to no run.

Hazard: nothing in a call says which step it is in, or who made it. Calls are not steps, callbacks call the model too,
and runs are abandoned midway. A call that cannot be placed with certainty is computed in full or raises an error.

Reading order: `session` (which run a call belongs to), with `denoiser` (a session that is called like the model) and
`finding` (one that finds out which pipeline calls it); `current_run` and `displaced` (the run under way, and those that
another one interrupted); `scheduler`, `following` and `run_timesteps` (what schedulers report);
`schedule_choice` (which schedule); `step_count`, `steps_by_timestep` and `timestep_order` (which step); `frames`,
`origin` and `by_hand` (who makes the call); `run`, `streams` and `features` (which stream, and what it may reuse);
`conditioning` (whether its request changed); `run_stats` and `notices` (what is reported, and what is logged once);
`gradients` (inputs that are refused); `outside_dynamo`. Runs by `sample`: `sampled_run` (what is asked for, and
the loop), `linear_sampler` and `known_samplers` (what a scheduler computes between the steps).
"""
