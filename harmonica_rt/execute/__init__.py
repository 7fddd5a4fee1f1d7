"""Execute: a lowered plan and the model's parameters -> streams that run it step by step.

In: `Plan`, the lowering's name, live tensors. Out: an engine (`harmonica_rt.engine`) whose streams answer calls:
slots in memory, values computed before the steps, step programs launched one by one or replayed as CUDA graphs.

Hazard: a CUDA graph holds addresses, so everything it reads must stay in place. Parameters are fetched anew in each
run; graphs are recorded anew if anything they read has moved.

Reading order: `planned_engine` (captures and plans at the first call of a signature) with `model_looks` (when it looks
at the model) and `new_states` (how often it may change), `plan_cache`, `op_kernels` (Triton kernels compiled ahead),
`plan_runtime` (a plan at work) and what it is made of: `lowered_plan`, `parameter_binding`, `arena_pool` with
`slot_buffers`, `forecast`; `plan_stream`; `launched_stream` with `stream_prologue` and `lowered_prologue`;
`request_value_stream`. For GPUs: `cuda_graphs` (records and replays a graph), `graph_replay` (the graphs of one
stream), `graph_memory` (all that they read and write: `static_tensors`, `hoisted_memory`, `step_counter`),
`graphed_stream` and `graphed_prologue` (a stream whose steps and prologue are graphs), `launch_order`.
For runs that `sample` makes: `sampler` and `sampler_state` (what is computed between the steps, and where),
`whole_run_stream` (all steps of a run as one graph).
"""
