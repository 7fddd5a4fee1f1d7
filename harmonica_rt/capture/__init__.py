"""Capture: a model and one call -> one functional graph with every site marked.

In: an `nn.Module` and a `Call`; then the names of the sites. Out: a `CapturedModel`: the graph, its parameters by
name, and the values of the request that it holds for; marked, a `CapturedGraph`: the same with the outputs of each
site. Nothing in it depends on which entries a schedule reuses.

Hazard: tracing bakes in what Python reads, and patches objects that all threads share. The model is left as it was,
other threads notice nothing, and a forward that changes its own state is refused, naming what it changed.

Reading order: `captured_graph` (the results), `capture` (the stage), `captures` (kept for other schedules), `trace`
(how often a model is traced, and what it may do meanwhile), `export` (torch.export, kept in bounds by `one_thread` and
`shared_draws`), `sites` and `spans` (which nodes belong to a site), `request_values` and `request_value_mode` (values
of the request that a model asks for), `dynamo` with `dynamo_frame` and `dynamo_replay` (a graph traced by
torch.compile, as a captured graph).
"""
