"""Plan file: a plan <-> JSON, so that another process need not capture and plan again.

In: a `Plan` with the signature it is for. Out: plain JSON values. And back: from JSON that anyone may have written,
the same plan, checked against the model and against what this package writes.

Hazard: files are passed around. So nothing in a file is code: operators come from an allow-list and must fit their
schemas, layouts are inferred again, and slots must lie within their arenas.

Reading order: `file` (digest, versions), `plan_record`, `graph_encoding` and `graph_decoding`, `operators` (the
allow-list), `model_facts` (what a file is checked against); `json_fields`, `values`, `constants` and `trees` are
helpers.
"""
