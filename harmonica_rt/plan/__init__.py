"""Plan: a captured graph and a schedule -> everything that can be decided ahead of the runs of one call signature.

In: `CapturedGraph`, `Schedule`. Out: a `Plan`: one step graph per pattern (what is reused, what is stored), the table
from steps to step graphs, and a slot for every stored value.

Hazard: a value may be overwritten before the last step that reads it. `invariants` checks every plan for this, whoever
made the plan.

Reading order: `plan` (the stage), `step_graph` (what a step graph is) and `specialise` (makes one per pattern),
`histories` (the values that reused entries take), `liveness` (how long stored values live), `slots` (where those values
lie), `weight_tables` (the weights of all steps), `invariants`; `binding_time`, for the prologue, says what each value
depends on.
"""
