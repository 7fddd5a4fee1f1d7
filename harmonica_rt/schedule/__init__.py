"""Static cache schedules: which sites to compute and which to reuse at every step, and their file.

The contract between training and runtime. It depends on neither, nor on torch, Triton or diffusers: only on
numpy. matplotlib, rich and torch are imported by the one function that needs each (`Schedule.plot`, `render`,
`Schedule.from_router`).
"""

from harmonica_rt.schedule.draw import render
from harmonica_rt.schedule.provenance import MadeBy, ModelInfo, SamplerInfo
from harmonica_rt.schedule.routers import RouterKind
from harmonica_rt.schedule.schedule import Schedule

__all__ = ["MadeBy", "ModelInfo", "RouterKind", "SamplerInfo", "Schedule", "render"]
