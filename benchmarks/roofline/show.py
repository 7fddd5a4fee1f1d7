"""How predictions are shown: tables of rows, and the kernels of a program in order or summed by kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.roofline.gpus import Gpu
from benchmarks.roofline.kernel import Kernel
from benchmarks.roofline.predict import NO_SCHEDULE
from benchmarks.roofline.results import FULL, PARTIAL, PROLOGUE, RUN, Row
from benchmarks.roofline.seconds import seconds_of

NOTICE = "Predicted, not measured."
HEADINGS = (
    "lowering",
    "kernels: full step, partial step, prologue",
    "moved, full step",
    "FLOPs, full step",
    "full step (products, floor)",
    "partial step (products, floor)",
    "run",
    "vs torch.compile",
    "host per step, if above the device's",
)


def table(rows: Sequence[Row], gpus: Iterable[str]) -> str:
    """One Markdown table per case, schedule and GPU, under a line that says that nothing is measured."""
    parts = [NOTICE]
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        schedules = dict.fromkeys(row.schedule for row in of_case if row.schedule != NO_SCHEDULE)
        for schedule in schedules or [NO_SCHEDULE]:
            shown = [row for row in of_case if row.schedule in (schedule, NO_SCHEDULE)]
            parts += [f"**{case}, {schedule}, {gpu}**\n\n{_table(shown, gpu)}" for gpu in gpus]
    return "\n\n".join(parts)


def listing(kernels: Sequence[Kernel], gpu: Gpu) -> str:
    """The kernels in order, one per line: microseconds, bytes read and written, FLOPs, name, size and module."""
    lines = [f"{NOTICE} {gpu.name}; microseconds, MB read, MB written, GFLOPs, kernel, module"]
    for kernel in kernels:
        figures = f"{1e6 * seconds_of(kernel, gpu):8.2f} {kernel.read / 1e6:9.3f} {kernel.written / 1e6:9.3f}"
        region = "" if kernel.region is None else f"  [region {kernel.region}]"
        lines.append(f"{figures} {kernel.flops / 1e9:9.3f}  {kind_of(kernel)}  {kernel.where}{region}")
    return "\n".join(lines)


def top(kernels: Sequence[Kernel], gpu: Gpu, count: int) -> Iterator[tuple[str, int, float, float]]:
    """The kinds of kernels that take most of the time: each with its number, seconds and share of the whole."""
    sums: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        number, seconds = sums.get(kind_of(kernel), (0, 0.0))
        sums[kind_of(kernel)] = (number + 1, seconds + seconds_of(kernel, gpu))
    total = sum(seconds for _, seconds in sums.values())
    for name, (number, seconds) in sorted(sums.items(), key=lambda each: -each[1][1])[:count]:
        yield name, number, seconds, seconds / total


def kind_of(kernel: Kernel) -> str:
    """The name of a kernel, with the size of its product or of the largest tensor that it touches."""
    if kernel.extent is not None:
        batch, rows, columns, depth = kernel.extent
        return f"{kernel.name} {f'{batch} x ' if batch > 1 else ''}[{rows}, {depth}] [{depth}, {columns}]"
    largest = max((*kernel.reads, *kernel.writes), key=lambda access: access.nbytes)
    return f"{kernel.name} {list(largest.view[1])}"


def _table(rows: Sequence[Row], gpu: str) -> str:
    compiled = next((row.seconds[gpu] for row in rows if (row.lowering, row.step) == ("torch.compile", RUN)), None)
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for lowering in dict.fromkeys(row.lowering for row in rows):
        by_step = {row.step: row for row in rows if row.lowering == lowering}
        lines.append(_cells(lowering, by_step, gpu, compiled))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(lowering: str, by_step: dict[str, Row], gpu: str, compiled: float | None) -> tuple[str, ...]:
    full, partial, before, run = (by_step.get(step) for step in (FULL, PARTIAL, PROLOGUE, RUN))
    counts = (f"{row.work['kernels']:.4g}" if row else "-" for row in (full, partial, before))
    return (
        lowering,
        ", ".join(counts),
        f"{(full.work['read'] + full.work['written']) / 1e9:.3g} GB" if full else "",
        f"{full.work['flops'] / 1e12:.3g} T" if full else "",
        _with_floors(full, gpu),
        _with_floors(partial, gpu),
        f"{1e3 * run.seconds[gpu]:.3g} ms" if run else "",
        f"{compiled / run.seconds[gpu]:.2f}x" if run and compiled else "",
        _host(full, partial, gpu),
    )


def _with_floors(row: Row | None, gpu: str) -> str:
    if row is None:
        return ""
    floors = f" ({1e3 * row.products[gpu]:.3g}, {1e3 * row.floor[gpu]:.3g})" if row.floor else ""
    return f"{1e3 * row.seconds[gpu]:.3g}{floors} ms"


def _host(full: Row | None, partial: Row | None, gpu: str) -> str:
    """The host's times that exceed the device's, for full and partial steps."""
    found = []
    for name, row in (("full", full), ("partial", partial)):
        if row is not None:
            kinds = dict.fromkeys(row.host) if row.host["graphs"] != row.host["launches"] else ["launches"]
            slow = [f"{1e3 * row.host[kind]:.2g} ms {kind}" for kind in kinds if row.host[kind] > row.seconds[gpu]]
            found += [f"{name}: {', '.join(slow)}"] if slow else []
    return "; ".join(found)
