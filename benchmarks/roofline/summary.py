"""The main table of docs/roofline.md, from the saved rows: `python -m benchmarks.roofline.summary` prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.roofline.gpus import gpus
from benchmarks.roofline.predict import NO_SCHEDULE
from benchmarks.roofline.results import FULL, PARTIAL, PATH, RUN, Row, read

SHOWN = "H100 SXM"
SCHEDULE = "every(2)"
CASES = ("DiT-XL/2 256", "DiT-XL/2 512", "PixArt-alpha 1024", "PixArt-Sigma 2048", "Flux-dev-like 1024")
COLUMNS = (
    "case",
    "kernels: full, partial",
    f"{SHOWN}, full step: torch.compile",
    "fused",
    "inductor",
    "products alone",
    "partial step: fused",
    *(f"run, {name}" for name in gpus()),
)


def summary(found: Sequence[Row]) -> str:
    """A Markdown table: one line per case; `run` is the speed-up of `fused` over torch.compile, both within graphs."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for case in dict.fromkeys(row.case for row in found):
        if case.startswith(CASES):
            lines.append(
                _cells(case, {(row.schedule, row.lowering, row.step): row for row in found if row.case == case})
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(case: str, of: Mapping[tuple[str, str, str], Row]) -> tuple[str, ...]:
    compiled, fused = of[NO_SCHEDULE, "torch.compile", FULL], of[SCHEDULE, "fused", FULL]
    partial = of[SCHEDULE, "fused", PARTIAL]
    runs = of[NO_SCHEDULE, "torch.compile", RUN].seconds, of[SCHEDULE, "fused", RUN].seconds
    return (
        case,
        f"{fused.work['kernels']:.0f}, {partial.work['kernels']:.0f}",
        *(_time(row.seconds) for row in (compiled, fused, of[SCHEDULE, "inductor", FULL])),
        _time(fused.products),
        _time(partial.seconds),
        *(f"{runs[0][name] / runs[1][name]:.2f}x" for name in gpus()),
    )


def _time(seconds: Mapping[str, float]) -> str:
    value = seconds[SHOWN]
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


if __name__ == "__main__":
    print(summary(read(PATH)))
