"""Plan: a captured graph and a schedule -> the whole static program of one call signature.

In: `CapturedGraph`, `Schedule`. Out: a `Plan`: one step graph per pattern of (reuse, store), the table from steps to
step graphs, and a slot for every stored value.

Hazard: a value that is overwritten while a later step still reads it. `invariants` checks every plan for it, whoever
made it.

Reading order: `plan` (the stage), `specialise` (a step graph per pattern), `liveness` (how long stored values live),
`slots` (where they lie), `invariants`; `binding_time` says what each value depends on.
"""
