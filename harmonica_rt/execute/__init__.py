"""Execute: a lowered plan and the model's parameters -> streams that run it step by step.

In: `Plan`, the lowering's name, live tensors. Out: an engine (`harmonica_rt.engine`) whose streams answer calls:
slots in memory, values computed before the steps, step programs launched one by one or replayed as CUDA graphs.

Hazard: a graph holds addresses, so all that it reads must stay where it was. Weights are fetched anew at each run;
what moved is recorded anew.

Reading order: `planned_engine` (captures and plans at the first call of a signature), `plan_cache`, `plan_stream`,
`slot_buffers`, `prologue`, `static_tensors`; for GPUs `cuda_graphs` (record and replay), `graph_replay` (of one
stream), `launch_order`.
"""
