"""`python -m benchmarks quality [--methods M ...] [--points T@S ...] [--seeds N ...] [--images N] [--workers N]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.quality import matrix, pareto
from benchmarks.quality.matrix import Settings
from benchmarks.quality.producers import PRODUCERS

QUICK_IMAGES = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Finish the chosen cells of the quality benchmark, then print and plot every row there is."""
    points = {str(point): point for point in matrix.SEEDS}
    seeds = sorted({seed for planned in matrix.SEEDS.values() for seed in planned})
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=main.__doc__)
    parser.add_argument("--methods", nargs="+", choices=PRODUCERS, metavar="M", help=f"of {', '.join(PRODUCERS)}")
    parser.add_argument("--points", nargs="+", choices=points, metavar="T@S", help=f"of {', '.join(points)}")
    parser.add_argument("--seeds", nargs="+", type=int, choices=seeds, metavar="N", help=f"of {seeds}, where planned")
    parser.add_argument("--images", type=int, help=f"of each cell (default: {matrix.IMAGES}, others are a trial)")
    parser.add_argument("--device", choices=matrix.IMAGES, default="cpu", help="cpu, or cuda for the full matrix")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (default: 1, this one)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_IMAGES} images, hardly any training: a trial")
    options = parser.parse_args(arguments)
    count = options.images or (QUICK_IMAGES if options.quick else matrix.IMAGES[options.device])
    if count < 2:
        parser.error("--images must be at least 2")
    if options.workers < 1:
        parser.error("--workers must be at least 1")

    settings = Settings.of(count, quick=options.quick, device=options.device)
    chosen_points = options.points and [points[name] for name in options.points]
    chosen = matrix.cells(options.methods, chosen_points, options.seeds, options.device)
    for row in matrix.run(chosen, settings, workers=options.workers):
        name = f"{row['method']} {row['steps']}@{row['target_speedup']} seed {row['seed']}"
        figures = [f"{metric} {row[metric]}" for metric in pareto.METRICS]
        print(f"{name}: speed-up {row['speedup']:.3f}, {', '.join(figures)}", flush=True)
    summaries = pareto.summarise(matrix.read(settings.rows))
    print(pareto.table(summaries))
    pareto.draw(summaries, settings.picture)
    print(f"rows: {settings.rows}\nplot: {settings.picture}")


if __name__ == "__main__":
    main()
