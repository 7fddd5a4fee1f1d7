"""What a schedule was made for and how: model, sampler, method. Immutable, hashable, and writable as JSON.

Hazard: configs of models and samplers are dicts that their owners may change later, with values that JSON cannot
represent (arrays, numpy numbers) or that compare badly (NaN). So each is copied once into a `FrozenMap` of plain
values, and a value that cannot be kept raises an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import check_name, check_number, check_sequence, check_text
from harmonica_rt.schedule.fingerprint import config_fingerprint
from harmonica_rt.untrusted.strict_json import MAX_DEPTH, MAX_DIGITS
from harmonica_rt.untrusted.text import one_line, quoted
from harmonica_rt.wrappers import unwrapped

_DEEPEST = MAX_DEPTH - 5  # nesting of lists and mappings; the file of a set adds five levels
SCORE_DECIMALS = 4  # enough to redraw a threshold, few enough to read and diff


class FrozenMap(Mapping[str, object]):
    """A read-only, hashable mapping of plain JSON values: lists become tuples, mappings become `FrozenMap`s.

    Raises:
        ScheduleError: a key is not a string, a value is none of bool, int, finite float, str, None, list, mapping, or
            lists and mappings are nested deeper than a file allows.
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, object], *, field: str = "config", depth: int = 0) -> None:
        self._items = {
            _key(key, field): _freeze(value, f"{field}.{one_line(key)}", depth + 1) for key, value in items.items()
        }

    def __getitem__(self, key: str) -> object:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return self._items == other._items if isinstance(other, FrozenMap) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[type[FrozenMap], tuple[dict[str, object]]]:
        return FrozenMap, (self._items,)

    def plain(self) -> dict[str, object]:
        """The same content as dicts and lists, ready for `json`."""
        return {key: _thaw(value) for key, value in self._items.items()}


@dataclass(frozen=True)
class ModelInfo:
    """The model that a schedule was made for.

    Attributes:
        class_name: name of the denoiser's class, e.g. `DiTTransformer2DModel`.
        config_fingerprint: fingerprint of its config; None if unknown.
    """

    class_name: str
    config_fingerprint: str | None = None

    @classmethod
    def of(cls, model: object) -> ModelInfo:
        """The record of a model, with the fingerprint of its `config` if it has one."""
        model = unwrapped(model)
        config = getattr(model, "config", None)
        # __class__ and not type(): a compiled model stands for the model inside
        return cls(model.__class__.__name__, config_fingerprint(config) if isinstance(config, Mapping) else None)

    def __post_init__(self) -> None:
        check_name(self.class_name, "model.class_name")
        if self.config_fingerprint is not None:
            check_name(self.config_fingerprint, "model.config_fingerprint")


@dataclass(frozen=True)
class SamplerInfo:
    """The sampler that a schedule was made for: the class and config (plain JSON values) of the scheduler."""

    class_name: str
    config: Mapping[str, object] = FrozenMap({})

    @classmethod
    def of(cls, scheduler: object) -> SamplerInfo:
        """The record of a scheduler, with the public entries of its `config`, if any (infinities as strings)."""
        config = getattr(scheduler, "config", None)
        entries = config.items() if isinstance(config, Mapping) else ()
        public = {key: value for key, value in entries if not key.startswith("_")}
        for key, value in public.items():
            if isinstance(value, float) and not math.isfinite(value):
                public[key] = str(value)  # diffusers' solvers use -inf, which JSON lacks
        return cls(type(scheduler).__name__, public)

    def __post_init__(self) -> None:
        check_name(self.class_name, "sampler.class_name")
        object.__setattr__(self, "config", check_mapping(self.config, "sampler.config"))


@dataclass(frozen=True)
class MadeBy:
    """The method that made a schedule.

    Attributes:
        method: e.g. `harmonica`, `learning-to-cache`, `every`.
        hyper_parameters: its hyper-parameters, any plain JSON values.
        threshold: tau, for methods that compute where `sigmoid(score) > tau`.
        scores: router logits, `[steps][sites]`, kept to four decimals; the row is None for a step without a router.
    """

    method: str
    hyper_parameters: Mapping[str, object] = FrozenMap({})
    threshold: float | None = None
    scores: Sequence[Sequence[float] | None] | None = None

    def __post_init__(self) -> None:
        check_name(self.method, "made_by.method")
        params = check_mapping(self.hyper_parameters, "made_by.hyper_parameters")
        object.__setattr__(self, "hyper_parameters", params)
        if self.threshold is not None:
            object.__setattr__(self, "threshold", check_number(self.threshold, "made_by.threshold"))
        if self.scores is not None:
            object.__setattr__(self, "scores", _check_scores(self.scores))


@dataclass(frozen=True)
class WeightsBy:
    """The method that made the weights of a schedule (`taylor`, `hermite`, `chebyshev`, `ratios`, ...), with settings.

    `Schedule.resample` applies it again; other methods may have any name and any plain JSON values as settings.
    """

    method: str
    hyper_parameters: Mapping[str, object] = FrozenMap({})

    def __post_init__(self) -> None:
        check_name(self.method, "weights_by.method")
        params = check_mapping(self.hyper_parameters, "weights_by.hyper_parameters")
        object.__setattr__(self, "hyper_parameters", params)


class ScheduleFields(TypedDict, total=False):
    """The arguments of `Schedule`, as file readers return them."""

    compute: NDArray[np.bool_]
    sites: tuple[str, ...]
    model: ModelInfo | None
    sampler: SamplerInfo | None
    timesteps: tuple[float, ...] | None
    guidance: float | None
    made_by: MadeBy | None
    weights: NDArray[np.float64] | None
    weights_by: WeightsBy | None


def check_mapping(value: object, field: str) -> FrozenMap:
    """A mapping of plain JSON values as a FrozenMap, or ScheduleError naming `field`."""
    if isinstance(value, FrozenMap):
        return value
    if not isinstance(value, Mapping):
        raise ScheduleError(f"{field}: expected a mapping of names to values, got {type(value).__name__}")
    return FrozenMap(value, field=field)


def _check_scores(scores: object) -> tuple[tuple[float, ...] | None, ...]:
    rows: list[tuple[float, ...] | None] = []
    for step, row in enumerate(check_sequence(scores, "made_by.scores")):
        field = f"made_by.scores, step {step}"
        if row is None:
            rows.append(None)
        else:
            values = (check_number(score, field) for score in check_sequence(row, field))
            rows.append(tuple(round(value, SCORE_DECIMALS) + 0.0 for value in values))  # + 0.0: no "-0.0"
    return tuple(rows)


def _key(key: object, field: str) -> str:
    if not isinstance(key, str):
        raise ScheduleError(f"{field}: keys must be strings, got {quoted(key)}")
    return check_text(key, field)


def _freeze(value: object, field: str, depth: int) -> object:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return check_number(value, field)
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        raise ScheduleError(f"{field}: expected a number of at most {MAX_DIGITS} digits")
    if isinstance(value, str):
        return check_text(value, field)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping | list | tuple) and depth > _DEEPEST:
        raise ScheduleError(f"{one_line(field)}: nested too deep, more than {_DEEPEST} lists and mappings")
    if isinstance(value, Mapping):
        return FrozenMap(value, field=field, depth=depth)
    if isinstance(value, list | tuple):
        return tuple(_freeze(item, f"{field}[{i}]", depth + 1) for i, item in enumerate(value))
    raise ScheduleError(
        f"{field}: a {type(value).__name__} cannot be written to JSON; give a bool, number, string, None, list or dict"
    )


def _thaw(value: object) -> object:
    if isinstance(value, FrozenMap):
        return value.plain()
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    return value
