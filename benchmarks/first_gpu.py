"""`python -m benchmarks.first_gpu [--out FOLDER] [--wheels FOLDER] [--seconds N] [--only STAGE ...]`.

The first run on a GPU, in at most eight minutes: correctness first, then speed. Each stage is a process of its own with
a time-out, and everything is written as it comes, so that a stage that hangs or crashes costs only itself. Where Python
has torch but not diffusers, `--wheels` names a folder of wheels to install; `--collect FOLDER` fills one on a machine
with an index.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RESULTS_FOR = ("latency-cuda.json", "latency-cuda.md", "kernels.json")  # written by stages
WHEELS = (
    *("diffusers", "importlib_metadata", "zipp", "nvidia-ml-py", "cache-dit", "hypothesis", "sortedcontainers"),
    *("typer", "shellingham", "annotated-doc", "pydantic", "pydantic_core", "annotated-types", "typing-inspection"),
    *("rich", "markdown-it-py", "mdurl", "Pygments"),
)
LEAST = 10  # seconds that must be left for a stage to begin

PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
LATENCY = (PYTHON, "-m", "benchmarks", "latency", "--no-alone", "--save", "--repeats", "5")
FEW = ("--providers", "eager", "reduce-overhead", "fused", "inductor")


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: what it shows.
        command: what runs.
        seconds: its time-out.
    """

    name: str
    command: tuple[str, ...]
    seconds: int


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: `ok`, `failed`, `timed out` or `no time left`; and the seconds that it took."""

    stage: str
    outcome: str
    seconds: float


STAGES = (
    Stage("toolchain", (PYTHON, "-m", "harmonica_rt.cli", "doctor"), 40),
    Stage("kernels equal their references", (*PYTEST, "tests/kernels"), 90),
    Stage("graphs, streams, lifetimes", (*PYTEST, "tests/execute/test_graph_replay_gpu.py"), 60),
    Stage("runs as one graph", (*PYTEST, "tests/execute/test_whole_run_gpu.py"), 45),
    Stage("families with graphs", (*PYTEST, "tests/execute/test_families_gpu.py"), 60),
    Stage(
        "DiT-XL/2, one image, every(2)",
        (*LATENCY, "--models", "dit-xl-256", "--images", "1", "--schedules", "every(2)", *FEW),
        110,
    ),
    Stage("DiT-XL/2, a run as one graph", (PYTHON, "-m", "benchmarks.whole_run", "--model", "dit-xl-256"), 45),
    Stage("profile of one step", (PYTHON, "-m", "benchmarks.step_profile", "--model", "dit-xl-256"), 50),
    Stage(
        "DiT-XL/2, released mask",
        (*LATENCY, "--models", "dit-xl-256", "--images", "1", "--schedules", "released", *FEW),
        60,
    ),
    Stage("predictions so far", (PYTHON, "-m", "benchmarks.roofline.against"), 20),
    Stage("kernels against copy bandwidth", (PYTHON, "-m", "benchmarks", "kernels", "--repeats", "5", "--save"), 60),
    Stage(
        "DiT-XL/2, eight images",
        (*LATENCY, "--models", "dit-xl-256", "--images", "8", "--schedules", "every(2)", "released", *FEW),
        90,
    ),
    Stage("Flux", (*LATENCY, "--models", "flux-1024", "--flux-blocks", "4", "8", "--images", "1", *FEW), 90),
    Stage("predictions", (PYTHON, "-m", "benchmarks.roofline.against"), 20),
    Stage(
        "compute-sanitizer",
        ("compute-sanitizer", "--error-exitcode", "1", *PYTEST, "tests/kernels/test_triton_gpu.py", "-k", "graph"),
        60,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages in order; 0 if all ended well."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_gpu", description=(__doc__ or "").partition("\n")[2]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "first_gpu", help="where logs, summary and rows are written")
    parser.add_argument("--wheels", type=Path, help="install these wheels, and build csrc, first")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="only download the wheels into this folder")
    parser.add_argument("--seconds", type=int, default=480, help="for everything (default: 480)")
    parser.add_argument(
        "--only", nargs="+", choices=[stage.name for stage in STAGES], metavar="STAGE", help="stages to run"
    )
    options = parser.parse_args(arguments)
    if options.collect is not None:
        return _collect(options.collect)
    options.out.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in STAGES if options.only is None or stage.name in options.only]
    return run((*_set_up(options.wheels), *stages), options.out, options.seconds)


def run(stages: Sequence[Stage], out: Path, seconds: float) -> int:
    """Run stages until the time is over.

    Args:
        stages: what to run, in order.
        out: a folder for `log.txt`, `summary.json` and the rows that stages wrote.
        seconds: for all stages together.

    Returns:
        0 if every stage ended well, else 1.
    """
    ends, outcomes = time.monotonic() + seconds, []
    with (out / "log.txt").open("a", buffering=1) as log:
        for stage in stages:
            outcomes.append(_run(stage, ends - time.monotonic(), log.fileno()))
            (out / "summary.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1))
            for name in RESULTS_FOR:
                if (RESULTS / name).exists():
                    shutil.copy(RESULTS / name, out / name)
            last = outcomes[-1]
            print(f"{last.outcome:12}  {last.seconds:6.1f} s  {last.stage}", flush=True)
    return int(any(each.outcome != "ok" for each in outcomes))


def _run(stage: Stage, left: float, log: int) -> Outcome:
    """Run one stage, for at most the `left` seconds; `log` is the descriptor that its output goes to."""
    if left < LEAST:
        return Outcome(stage.name, "no time left", 0.0)
    started = time.monotonic()
    try:
        subprocess.run(["printf", "\n== %s\n", stage.name], stdout=log, check=True)
        code = subprocess.run(
            stage.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=min(stage.seconds, left), check=False
        ).returncode
        outcome = "ok" if code == 0 else "failed"
    except subprocess.TimeoutExpired:
        outcome = "timed out"
    except FileNotFoundError:
        outcome = "failed"
    return Outcome(stage.name, outcome, time.monotonic() - started)


def _set_up(wheels: Path | None) -> tuple[Stage, ...]:
    """The stages that install wheels and build the extension; none without wheels."""
    if wheels is None:
        return ()
    found = sorted(map(str, wheels.glob("*.whl")))
    pip = (PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--break-system-packages")
    return (
        Stage("install the wheels", (*pip, *found), 60),
        Stage("build csrc", (*pip, "--no-build-isolation", "-e", str(ROOT)), 120),
    )


def _collect(folder: Path) -> int:
    """Download the wheels, pinned as `make` pins them, for Python 3.12 on Linux."""
    folder.mkdir(parents=True, exist_ok=True)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    wanted = [f"{name}=={pins[name]}" if name in pins else name for name in WHEELS]
    pip = [
        PYTHON,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--python-version",
        "3.12",
    ]
    return subprocess.run([*pip, "--dest", str(folder), *wanted], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
