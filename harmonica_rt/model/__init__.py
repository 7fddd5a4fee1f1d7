"""Model: the user's module and everything attached to it. Not a stage: all stages that run or inspect a model use it.

In: an `nn.Module`. Out: its own forward beneath hooks and wrappers; a `Facts` snapshot of all that a trace takes for
granted; a `ModelWatch` that tells before each call whether any of that changed; a fingerprint for files.

Hazard: a change that goes unnoticed gives a wrong image. So everything that code can reach by name counts, at any
depth; only what belongs to torch, numpy or the standard library is compared by identity.

Reading order: `forward`, `hooks` and `hooked_call` (what runs); `tensors`, `identity` and `hidden_state` (what can be
compared); `scope` (what counts); `fact_table`, `findings`, `walk` and `code_walk` with `code_names` (what is reached);
`facts` and `watch` (what changed); `use` (runs and traces exclude each other); `refusals` and `training_mode` say what
cannot be planned; `fingerprint` is for files.
"""
