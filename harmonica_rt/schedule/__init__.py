"""Static cache schedules: which sites to compute and which to reuse at each step, the site names, and the file format.

In: masks, rules, or files (our JSON, router checkpoints, SmoothCache). Out: a `Schedule`, immutable and checked.
Hazard: a wrong mask runs as well as the right one and only makes images worse, so each reader refuses what it cannot
be sure of, and names the file and the field.

Reading order: `data` and `checks` (what a schedule is), `schedule` (ways to make, read and write one), `producers`
(masks from rules), `provenance` with `fingerprint` (what a schedule was made for), `format` (the file), `writing` over
`files` (complete or not at all), `router_checkpoint` (reads the file) and `routers` (what its rows mean), `interchange`
(SmoothCache, cache-dit), `hub`, `draw`, `sites` (names of cacheable modules). `known/` holds the bundled schedules.

This package is the contract between training and runtime. It depends on neither, nor on torch, Triton or diffusers,
only on numpy. matplotlib, rich and torch are imported by the functions that need them (`Schedule.plot`, `render`,
`Schedule.from_router` and `find_sites`).
"""

from harmonica_rt.schedule.draw import render
from harmonica_rt.schedule.provenance import MadeBy, ModelInfo, SamplerInfo
from harmonica_rt.schedule.routers import RouterKind
from harmonica_rt.schedule.schedule import Schedule
from harmonica_rt.schedule.sites import find_sites

__all__ = ["MadeBy", "ModelInfo", "RouterKind", "SamplerInfo", "Schedule", "find_sites", "render"]
