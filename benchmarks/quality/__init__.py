"""Which method's schedule gives the best images at equal cost?

The bundled digits model (DDIM, guidance 2.0) is sampled under the schedules of several methods, each brought as near
as it comes to a target speed-up. Cost is the theoretical speed-up: FLOPs of the uncached run / FLOPs of the cached one.
The images of a cell (method, point, seed) are paired, noise by noise, with the uncached images of the same seed.

`python -m benchmarks quality` goes on where the last one stopped: a finished cell is a row in
`benchmarks/results/quality-DEVICE.json`, a schedule a file in `benchmarks/results/schedules/`, and uncached images lie
in `.bench/quality/`. All three belong to the bundled model as it is; whoever trains it anew deletes them.

The Frechet distance here is taken in the features of the model's own digit classifier. It is not FID and compares with
no published FID.
"""
