"""Measures the host time of a whole run whose steps are graphs that launch nothing, as `host_path` does of one step.

The model is that of `host_path`. A run is sampled in three ways: by calls of the compiled model with the scheduler's
own steps in between, by `sample` step by step, and by `sample` with all steps as one graph.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

import harmonica_rt as hrt
from benchmarks import models, schedules
from benchmarks.host_path import IdlePool
from benchmarks.rows import Row, spread_row
from benchmarks.sampled_runs import ways
from benchmarks.timing import interleaved
from harmonica_rt.api import CompiledModel
from harmonica_rt.execute.cuda_graphs import Graphs
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.options import CompileOptions

STEPS = 20
WARM_UPS = 4  # runs in each way: timesteps are forecast, and graphs recorded


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Seconds of the host per run, in each way."""
    layers, rounds = (2, 1) if quick else (28, 10)
    model = models.dit(layers=layers, heads=2, head_dim=8)
    call = models.dit_calls(model, 2, STEPS)[0]
    schedule = schedules.ten_patterns(hrt.find_sites(model), STEPS)
    pool = IdlePool()
    engine = PlannedEngine(
        model, schedule, CompileOptions(strict=True, max_plans=1), Graphs(lambda device: pool, measured=False)
    )
    compiled = CompiledModel(model, schedule, engine, verify=False)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    providers = ways(compiled, call["hidden_states"], scheduler, {"class_labels": call["class_labels"]})
    with torch.no_grad():
        for _ in range(WARM_UPS):
            for way in providers.values():
                way()
        pool.idle = True
        found = interleaved(providers, repeats * rounds)
    case = f"DiT, {layers} blocks of width 16, batch 2, {STEPS} steps"
    return [
        spread_row("host_run", case, "10 patterns", f"host, per run: {name}", samples, "s")
        for name, samples in found.items()
    ]
