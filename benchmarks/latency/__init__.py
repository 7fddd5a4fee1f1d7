"""Side by side: whole denoising runs of harmonica-rt, of the plain model, and of other caches at equal work.

`cases` has the models and their calls, `providers/` one small adapter each, `gate` holds outputs against the reference,
`measure` and `nvml` take the times and what the GPU did meanwhile, `floor` finds what a step cannot go below, `alone`
what compiling and memory cost, `run` goes through all of it, `results` and `show` keep it.
"""
