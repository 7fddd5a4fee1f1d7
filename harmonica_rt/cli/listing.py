"""`harmonica-rt sites` and `harmonica-rt recipes`: lists of the sites of a pipeline, and of the bundled recipes."""

from __future__ import annotations

from pathlib import Path

from harmonica_rt.cli.console import console, line, print_unwrapped
from harmonica_rt.cli.options import LEVEL, MODEL, PATTERN


def sites(
    model: Path = MODEL,
    pattern: list[str] = PATTERN,
    level: str | None = LEVEL,
) -> None:
    """List the sites of a pipeline's denoiser, in execution order: its sub-layers, unless --level says otherwise."""
    from collections import Counter

    from harmonica_rt import find_sites
    from harmonica_rt.cli.loading import load_denoiser
    from harmonica_rt.schedule.producers import site_kind

    denoiser = load_denoiser(model)
    found = find_sites(denoiser, pattern or None, level=level)
    for site in found:
        print_unwrapped(site)
    kinds = Counter(site_kind(site) for site in found)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    console.print(line((f"{len(found)} sites of {type(denoiser).__name__}", "bold"), f": {counted}"))


def recipes() -> None:
    """List the recipes that come with the package; `--recipe` takes their names."""
    from rich.padding import Padding

    from harmonica_rt import recipes

    for name in recipes.known():
        recipe = recipes.read(name)
        print_unwrapped(name)
        if recipe.model is not None:
            print_unwrapped(f"    model: {recipe.model}")
        console.print(Padding(recipe.about, (0, 0, 1, 4)))
