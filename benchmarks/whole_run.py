"""`python -m benchmarks.whole_run [--model M] [--images N] [--device D] [--lowering L] [--repeats N]`.

Time of a run, and of the host in it, by calls and scheduler steps, by `sample` step by step, and by `sample` with all
steps as one graph. First it is checked that the latter two agree bit for bit, and that the loop agrees up to rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler

import harmonica_rt as hrt
from benchmarks.latency.cases import case_of, geometries
from benchmarks.sampled_runs import LOOP, STEPS, WHOLE, ways
from benchmarks.timing import Spread
from harmonica_rt.options import LOWERINGS

MODELS = ("bundled", "dit-xl-256")  # called with twice the images, the first half conditional
WARM_UPS = 4  # runs in each way: timesteps become known, and graphs are recorded
ROUNDING = 0.05  # of the largest value: the loop rounds latents to the model's dtype in every step


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the three ways to sample a run against each other, and print the milliseconds of each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_run", description=main.__doc__)
    parser.add_argument("--model", choices=MODELS, default="bundled")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lowering", choices=LOWERINGS, default="fused")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    case = case_of(
        geometries()[options.model],
        options.images,
        20,
        device,
        torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    schedule = hrt.Schedule.every(2, steps=case.steps, sites=hrt.find_sites(case.model))
    compiled = hrt.compile(case.model, schedule, lowering=options.lowering, strict=True)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(case.steps)
    latents = case.calls[0]["hidden_states"][: options.images]
    conditioning = {
        name: value for name, value in case.calls[0].items() if name not in ("hidden_states", "timestep", "return_dict")
    }
    providers = ways(compiled, latents, scheduler, conditioning, guidance_scale=4.0, conditional_first=True)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad():
        for _ in range(WARM_UPS):
            results = {name: way().float() for name, way in providers.items()}
        largest = float(results[STEPS].abs().max())
        error = float((results[LOOP] - results[STEPS]).abs().max()) / largest
        same = torch.equal(results[WHOLE], results[STEPS])
        print(f"{case.name}, {options.lowering}, every(2): one graph gives {'the same' if same else 'OTHER'} bits,")
        print(f"the loop differs by {error:.2g} of the largest value")
        rounds = [{name: _seconds(way, wait) for name, way in providers.items()} for _ in range(options.repeats)]
        for name in providers:
            host, whole = (1e3 * Spread.of([each[name][column] for each in rounds]).p50 for column in range(2))
            print(f"{name:32} {whole:9.3f} ms per run, of which the host {host:9.3f} ms")
    return int(not same or error > ROUNDING)


def _seconds(run: Callable[[], object], wait: Callable[[], None]) -> tuple[float, float]:
    """Seconds until `run` returns, and until the device is done."""
    wait()
    started = time.perf_counter()
    run()
    returned = time.perf_counter()
    wait()
    return returned - started, time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
