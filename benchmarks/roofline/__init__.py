"""Step times predicted from the lowered graphs, for GPUs that are not here: kernels, bytes, FLOPs, seconds.

In: models on the meta device, schedules, lowerings, and the constants of GPUs (`gpus.toml`). Out: rows per case,
schedule, lowering and kind of step, a table, and the list of a program's kernels in order. Hazard: nothing here is
measured; a prediction is as good as its constants, so each has its source or says that it is assumed.

Reading order: `kernel` (what is counted), `recorder` (programs run on meta tensors, and the operators that launch),
`cuda_kernels` (what one operator launches), `fusion` (what Inductor makes of a region), `gpus` and `seconds` (time of
a kernel, floor of a step), `cases` (models), `programs` and `prologue` (the kernels of every step of a lowering, and
of what is before the steps), `predict`, `results`, `show` and `summary` (tables).
"""
