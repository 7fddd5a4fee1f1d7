"""Compares forecasts: what reused values are made of, on one mask, at equal FLOPs, with other libraries' TaylorSeer.

`python -m benchmarks quality --forecasts`. The bundled digits model (DDIM, 20 steps, guidance 2.0) is sampled under
`every(2)`, `every(3)` and the bundled schedule, each with plain reuse, the rules of TaylorSeer, HiCache and Spectrum,
and weights that `hrt.fit` finds. Images are compared one by one with the uncached ones of the same noise.

In: cells (schedule, site level, method, seed). Out: one row per cell in `benchmarks/results/forecasts-DEVICE.json`, and
a table with bootstrap intervals over the images. A run continues where the last one stopped.

Hazard: a method that is tuned on the images it is judged by looks better than it is. Settings are chosen, and weights
fitted, with noise that no row is measured with.

Reading order: `methods` (ours), `peers` (diffusers, cache-dit), `tuning` (the best setting of each), `cells` (rows),
`table` (intervals), `latency`.
"""
