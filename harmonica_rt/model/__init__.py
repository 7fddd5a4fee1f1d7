"""Model: the user's module and whatever hangs on it. Not a stage: every stage that runs or reads a model asks here.

In: an `nn.Module`. Out: its own forward beneath hooks and wrappers; a `Facts` snapshot of all that a trace takes for
granted; a `ModelWatch` that tells before each call whether any of that changed; a fingerprint for files.

Hazard: what is not seen to change gives a stale image. So whatever code can reach by name counts, at any depth; only
torch and the standard library are told by identity.

Reading order: `forward` and `hooks` (what runs), `tensors`, `identity` and `hidden_state` (what can be compared),
`walk` with `code_names` (what is reached), `facts`, `watch`; `refusals` and `training_mode` say what cannot be
planned; `fingerprint` is for files.
"""
