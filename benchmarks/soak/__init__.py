"""Random runs against an independent oracle: `python -m benchmarks soak`.

In: a seed. Out: rows that count runs and faults, and for each fault the seed that brings it back. Hazard: whatever the
oracle shares with the package, the soak cannot see; so it is written with forward hooks and told by the driver, never
by the package, what state the model is in.

Reading order: `oracle.py` (what is right), `toy.py` (a model that reads every kind of state), `changes.py` (what can
be done to a model), `subjects.py` (pipelines), `runs.py` (random runs as data), `world.py` (one run on both sides),
`together.py` (several runs at once), `drive.py` (many worlds, counted), `shrink.py`.
"""
