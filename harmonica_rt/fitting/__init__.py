"""Fits the weights of a schedule: least squares between what an entry reuses and what it would have computed.

In: a model or a pipeline, a schedule, and calls to learn from. Out: the same schedule with weights. The loop is closed:
each run goes on from the forecast with the weights of all calls so far, so that later steps are fitted to what they
will meet in use.
Hazard: the latest values of a site may be nearly the same, so that their products say nothing about the difference; see
`moments`. And a run that is interrupted must leave the pipeline as it was; see `pipelines.one_run`.

Reading order: `moments` (the least squares of one entry), `moment_table` (of all entries, and which of them share),
`fitting_engine` (the truth and the forecast at each step), `fit` (the calls, and the schedule that comes of them).
"""
