"""Random runs compared with an independent oracle: `python -m benchmarks soak`.

In: a seed. Out: rows that count runs and faults, and for each fault the seed that reproduces it. Hazard: the soak
cannot see an error that the oracle shares with the package. The oracle is therefore made of forward hooks, and the
driver, not the package, tells it which state the model is in.

Reading order: `oracle` (what is right), `toy` and `loop` (a model and a pipeline that read every kind of state),
`change` and `changes` (what can be done to a model), `samplers`, `subject`, `loop_subject`, `diffusers_builds`,
`diffusers_calls` and `subjects` (the pipelines), `world` (runs as data), `random_world`, `outcome`, `side`, `plain`,
`ctrl_c` and `compiled` (one run on each side), `pair` (both sides compared), `concurrent_runs`, `drive` (many worlds,
counted), `shrink`.
"""
