"""Execute: a lowered plan and the model's parameters -> streams that run it step by step.

In: `Plan`, the lowering's name, live tensors. Out: an engine (`harmonica_rt.engine`) whose streams answer calls:
slots in memory, values computed before the steps, step programs launched one by one or replayed as CUDA graphs.

Hazard: a CUDA graph holds addresses, so everything it reads must stay in place. Parameters are fetched anew in each
run; graphs are recorded anew if anything they read has moved.

Reading order: `planned_engine` (captures and plans at the first call of a signature; `new_states` limits how often),
`plan_cache`, `plan_runtime` (a plan at work) and what it is made of: `lowered_plan`, `parameter_binding`,
`arena_pool` with `slot_buffers`, `forecast`; `plan_stream` with `stream_prologue` and `lowered_prologue`;
`request_value_stream`; for GPUs `graphed_stream` with `graphed_prologue`, what they keep at fixed addresses
(`graph_memory`: `static_tensors`, `hoisted_memory`, `step_counter`), `graph_replay` (the graphs of one stream),
`cuda_graphs` (record and replay), `launch_order`.
"""
