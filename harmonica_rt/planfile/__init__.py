"""Plan file: a plan <-> JSON, so that another process need not capture and plan again.

In: a `Plan` with the signature it is for. Out: plain JSON values, and from JSON that anyone may have written the same
plan, checked against the model and against what this package writes.

Hazard: files are passed around. Nothing in one is code: operators come from an allow-list and fit their schemas,
layouts are inferred again, slots lie within their arenas.

Reading order: `file` (digest, versions), `plan_record`, `graph_record`, `operators` (the allow-list); `json_fields`,
`values` and `trees` are the small change.
"""
