"""Times whole denoising runs side by side: harmonica-rt, the plain model, and other caches at equal work.

In: models, batches, schedules and providers. Out: one row per case, schedule and provider, a table and a plot. Hazard:
a fast wrong output is worthless, so a row has figures only after the gate compared its outputs with the reference.

Reading order: `cases` (models and their calls), `providers/` (one small adapter each), `gate` (outputs compared with
the reference), `measure` and `nvml` (times, and the state of the GPU during a run), `floor` (what a step cannot go
below), `alone` (compile time and memory, in a separate process), `results` and `figures` (rows), `settings`, `run`
(all of it), `show` (table and plot).
"""
