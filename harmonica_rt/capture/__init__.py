"""Capture: a model and one call -> one functional graph with every site marked.

In: an `nn.Module`, a `Call`, the paths of the sites. Out: a `CapturedGraph`: graph, parameters by name, the outputs
of each site, and which values of the request it was made for. Nothing in it depends on which entries a schedule
reuses.

Hazard: tracing bakes in what Python reads, and replaces what all threads share. The model is left as it was; other
threads notice nothing; a forward that changes its own state is refused by name.

Reading order: `capture` (the stage), `export` (torch.export, kept in bounds by `one_thread` and `shared_draws`),
`sites` (which nodes are a site's), `request_values` (values that a model reads of its request), `dynamo` (what
torch.compile traced, as a captured graph).
"""
