"""What pictures of a schedule show: panels of sites by kind, the provenance in words, and how many values are reused.

Sites of one kind share a panel, because what a method learns differs more between attention and MLP than between
neighbouring blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.producers import site_kind
from harmonica_rt.schedule.site_names import span_of
from harmonica_rt.schedule.weights import reach
from harmonica_rt.untrusted.text import one_line

_MAX_PANELS = 8  # with more kinds than this, all sites share one panel, in execution order
_LABEL, _FACT = 60, 2000  # characters at most


@dataclass(frozen=True)
class Panel:
    """Sites of one kind: their columns in the schedule, and a short printable label for each."""

    title: str
    columns: tuple[int, ...]
    labels: tuple[str, ...]
    axis: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", one_line(self.title, _LABEL))
        object.__setattr__(self, "labels", tuple(one_line(label, _LABEL) for label in self.labels))


def panels_of(sites: Sequence[str]) -> list[Panel]:
    """One panel per kind of site, in order of first appearance."""
    kinds: dict[str, list[int]] = {}
    for column, site in enumerate(sites):
        kinds.setdefault(site_kind(site), []).append(column)
    if len(kinds) > min(_MAX_PANELS, max(1, len(sites) // 2)):
        return [Panel("sites", tuple(range(len(sites))), tuple(sites), "site")]
    return [_panel(kind, columns, sites) for kind, columns in kinds.items()]


def _panel(kind: str, columns: list[int], sites: Sequence[str]) -> Panel:
    """The panel of a kind: sites are labelled by block numbers if these tell them apart, else by their parents."""
    spans = [span_of(sites[column]) for column in columns]
    if all(spans) and len({span.path for span in spans if span}) == 1:
        return Panel(kind, tuple(columns), tuple(f"{span.start}:{span.stop}" for span in spans if span), "blocks")
    paths = [sites[column].split(".") for column in columns]
    numbers = [".".join(part for part in path if part.isdigit()) for path in paths]
    if all(numbers) and len(set(numbers)) == len(numbers):
        return Panel(kind, tuple(columns), tuple(numbers), "block")
    if any(spans):
        return Panel(kind, tuple(columns), tuple(sites[column] for column in columns), "")
    owners = [".".join(path[: len(path) - path[::-1].index(kind) - 1]) or kind for path in paths]
    return Panel(kind, tuple(columns), tuple(owners), "")


def facts(schedule: ScheduleData) -> list[tuple[str, str]]:
    """The provenance as (name, value) pairs; unknown entries are left out."""
    facts = []
    if (model := schedule.model) is not None:
        mark = f" ({model.config_fingerprint})" if model.config_fingerprint else ""
        facts.append(("model", model.class_name + mark))
    if schedule.sampler is not None:
        facts.append(("sampler", schedule.sampler.class_name))
    if (times := schedule.timesteps) is not None:
        facts.append(("timesteps", f"{times[0]:g} ... {times[-1]:g}"))
    if schedule.guidance is not None:
        facts.append(("guidance", f"{schedule.guidance:g}"))
    if (made := schedule.made_by) is not None:
        params = _settings(made.hyper_parameters)
        tau = "" if made.threshold is None else f", threshold {made.threshold:g}"
        facts.append(("made by", made.method + params + tau + (", with scores" if made.scores is not None else "")))
    if schedule.weights is not None:
        facts.append(("weights", weights_in_words(schedule)))
    return [(name, one_line(value, _FACT)) for name, value in facts]


def weights_in_words(schedule: ScheduleData) -> str:
    """How many entries have weights, how many weights at most, and who made them."""
    entries, reused = int(weights_of_entries(schedule).astype(bool).sum()), int((~schedule.compute).sum())
    by = schedule.weights_by
    made = "" if by is None else f", made by {by.method}{_settings(by.hyper_parameters)}"
    return f"up to {schedule.most_weights} per entry, {entries} of {reused} reused entries{made}"


def weights_of_entries(schedule: ScheduleData) -> NDArray[np.int64]:
    """`[steps, sites]`: how many weights an entry has; 0 where it is computed or plainly reused."""
    weights = schedule.entry_weights
    plain = (weights[..., 0] == 1.0) & ~weights[..., 1:].any(axis=-1)
    return np.where(plain, 0, reach(weights))


def _settings(values: Mapping[str, object]) -> str:
    """Settings in words; of a long list, only its length."""
    shown = {n: f"{len(v)} values" if isinstance(v, tuple) and len(v) > 4 else v for n, v in values.items()}
    return "".join(f", {name}={value}" for name, value in shown.items())
