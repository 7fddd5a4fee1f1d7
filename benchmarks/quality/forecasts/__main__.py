"""`python -m benchmarks quality --forecasts [--images N] [--only TEXT] [--latency N]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import rows as common
from benchmarks.quality.forecasts import latency, table
from benchmarks.quality.forecasts.cells import bundled_pipeline, cells, run, settings_of

IMAGES = 12  # per cell, of the published rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Finish the chosen cells, or time them, then print the table of all rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality --forecasts", description=main.__doc__)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"images per cell (default: {IMAGES})")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cells with TEXT in schedule, level or method")
    parser.add_argument("--latency", type=int, metavar="N", help="time all methods in N interleaved rounds instead")
    options = parser.parse_args(arguments)
    if options.images < 2:
        parser.error("--images must be at least 2")
    if options.latency is not None and options.latency < 1:
        parser.error("--latency must be at least 1")

    path = common.RESULTS / "forecasts-cpu.json"
    if options.images != IMAGES:
        path = common.RESULTS.parents[1] / ".bench" / "forecasts" / f"{options.images}.json"
    chosen = [cell for cell in cells() if options.only in f"{cell.schedule} {cell.level} {cell.method}"]
    if options.latency is not None:
        latency.measure(chosen, options.latency, settings_of(common.read(path)))
    else:
        pipeline = bundled_pipeline()
        for row in run(pipeline, options.images, path, chosen):
            figures = row.get("reason") or f"{row['speedup']:.3f}x, {row['psnr']:.2f} dB, {row['setting']}"
            print(f"{row['schedule']} {row['level']} {row['method']} seed {row['seed']}: {figures}", flush=True)
    lines = table.lines(common.read(path), latency.medians())
    print(f"{table.markdown(lines)}\n\n{table.overview(lines)}")
    print(f"rows: {path}")


if __name__ == "__main__":
    main()
