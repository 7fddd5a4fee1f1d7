"""Measures whatever is claimed about speed, memory, quality and robustness: `python -m benchmarks`.

In: the name of a benchmark and options. Out: a table of rows, and with `--save` the same rows in `results/`, each with
the machine that it was measured on. Hazard: a fast wrong output is worthless, so outputs are compared with the
reference before they are timed; baselines run interleaved in the same process, because machines drift.

Reading order: `rows`, `timing` and `memory` (figures and how they are kept), `models` and `schedules` (what is
measured), one module per benchmark (`kernels` with `kernel_ops`, `weighted_ops` and `rotary_op`, `speedup`,
`end_to_end`, `site_levels`, `host_path`, `host_run`, `compile_cost`, `slot_memory` with `slot_models`, `zoo`,
`training_cost` with `training_work`, `time_to_quality`), and five folders with commands of their own: `latency` (side
by side with other caches), `roofline` (step times predicted for GPUs), `quality` (images at equal cost), `fuzz`
(damaged files), `soak` (random runs against an oracle). Three scripts are not among them: `first_gpu` (tests and
benchmarks for the first run on a GPU, each with a time-out), `step_profile` (the kernels of one step) and `whole_run`
(a run as one graph beside a run step by step; `sampled_runs` has the ways to run it).
"""
