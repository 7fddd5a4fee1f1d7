"""Static cache schedules: which sites to compute and which to reuse at each step, the site names, and the file format.

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
