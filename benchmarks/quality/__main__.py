"""`python -m benchmarks quality [--methods M ...] [--points T@S ...] [--seeds N ...] [--images N] [--workers N]`.

`python -m benchmarks quality --forecasts ...` is another comparison, with options of its own: `quality.forecasts`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from benchmarks import rows
from benchmarks.quality import matrix, pareto
from benchmarks.quality.matrix import Settings
from benchmarks.quality.producers import PRODUCERS

QUICK_IMAGES = 20
FORECASTS = "--forecasts"


def main(arguments: Sequence[str] | None = None) -> None:
    """Finish the chosen cells of the quality benchmark, then print and plot all rows."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if FORECASTS in given:
        given.remove(FORECASTS)
        importlib.import_module("benchmarks.quality.forecasts.__main__").main(given)
        return
    points = {str(point): point for point in matrix.SEEDS}
    seeds = sorted({seed for planned in matrix.SEEDS.values() for seed in planned})
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=main.__doc__)
    parser.add_argument("--methods", nargs="+", choices=PRODUCERS, metavar="M", help=f"methods: {', '.join(PRODUCERS)}")
    parser.add_argument(
        "--points", nargs="+", choices=points, metavar="T@S", help=f"points, as STEPS@SPEEDUP: {', '.join(points)}"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        choices=seeds,
        metavar="N",
        help=f"seeds, of {seeds}; only those planned for the point",
    )
    parser.add_argument(
        "--images", type=int, help=f"images per cell (default: {matrix.IMAGES}; any other number is a trial)"
    )
    parser.add_argument(
        "--device", choices=matrix.IMAGES, default="cpu", help="cpu, or cuda for the full matrix (default: cpu)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="worker processes of one thread each (default: 1, this process)"
    )
    parser.add_argument(FORECASTS, action="store_true", help="compare forecasts instead; it has options of its own")
    parser.add_argument("--quick", action="store_true", help=f"a trial: {QUICK_IMAGES} images and hardly any training")
    options = parser.parse_args(given)
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
    summaries = pareto.summarise(rows.read(settings.rows))
    print(pareto.table(summaries))
    pareto.draw(summaries, settings.picture)
    print(f"rows: {settings.rows}\nplot: {settings.picture}")


if __name__ == "__main__":
    main()
