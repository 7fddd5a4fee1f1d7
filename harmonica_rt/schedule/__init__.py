"""Static cache schedules: which sites to compute and which to reuse at each step, the site names, and the file format.

In: masks, rules, or files (our JSON, router checkpoints, SmoothCache). Out: a `Schedule`, immutable and checked.
Hazard: a wrong mask runs as well as the right one and only makes images worse, so each reader refuses what it cannot
be sure of, and names the file and the field.

Reading order: `data`, `checks` and `weights` (what a schedule is), `weighted` over `weight_rules` and `differences`
(weights by rule), `resampling` and `resampled_weights` (other numbers of steps), `exchanged` over `interchange`,
`cache_dit`, `diffusers_caches` and `routers` (schedules of other tools), `schedule` (the class itself), `producers`
(masks from rules), `provenance` with `fingerprint` (what a schedule was made for), `format` with `weights_text` (the
file), `schedule_set` (schedules for several numbers of steps), `writing` over `files` (complete or not at all),
`router_checkpoint` and `flat_yaml` (files of others, read as data), `hub`, `terminal` and `heat_map` over `panels`
(pictures), `site_names` and `sites` over `site_rule` (what can be cached, and its names), `bundled` (the schedules in
`known/`).

This package is the contract between training and runtime. It depends on neither, nor on torch, Triton or diffusers,
only on numpy. matplotlib, rich, torch and yaml are imported by the functions that need them (`Schedule.plot`, `render`,
`Schedule.from_router`, `find_sites` and `Schedule.from_cache_dit`).
"""

from harmonica_rt.schedule.provenance import MadeBy, ModelInfo, SamplerInfo, WeightsBy
from harmonica_rt.schedule.routers import RouterKind
from harmonica_rt.schedule.schedule import Schedule
from harmonica_rt.schedule.schedule_set import ScheduleSet
from harmonica_rt.schedule.site_names import OUTPUT
from harmonica_rt.schedule.sites import find_sites
from harmonica_rt.schedule.terminal import render

__all__ = [
    "OUTPUT",
    "MadeBy",
    "ModelInfo",
    "RouterKind",
    "SamplerInfo",
    "Schedule",
    "ScheduleSet",
    "WeightsBy",
    "find_sites",
    "render",
]
