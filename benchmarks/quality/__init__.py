"""Compares the images that schedules of several methods give at equal cost.

The bundled digits model (DDIM, guidance 2.0) is sampled under the schedules of several methods, each as close as
possible to a target speed-up. Cost is the theoretical speed-up: FLOPs of the uncached run / FLOPs of the cached one.
The images of a cell (method, point, seed) are compared one by one with the uncached images of the same noise.

In: cells. Out: one row per cell in `benchmarks/results/quality-DEVICE.json`, its schedule in
`benchmarks/results/schedules/`, and the uncached images in `.bench/quality-DEVICE/`. A run continues where the last one
stopped. All of these are valid for the current bundled model only; delete them after training it again.

Hazard: the Frechet distance is taken in the features of the model's own digit classifier. It is not FID and cannot be
compared with any published FID.

Reading order: `producers` (the methods), `cost`, `images` (sampling), `metrics`, `matrix` (the cells), `pareto` (table
and plot).
"""
