"""The schedule file: versioned JSON that a person can read and diff, specified in `docs/schedule-format.md`.

Hazard: JSON readers are lenient (of two equal keys the last wins, NaN passes, unknown keys are dropped), so a bad merge
or a typo would load as a different schedule. Here each of these is an error that names the field; whatever
`untrusted.strict_json` accepts is then checked field by field.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import check_number, check_sequence, check_sites
from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.provenance import (
    SCORE_DECIMALS,
    MadeBy,
    ModelInfo,
    SamplerInfo,
    ScheduleFields,
    WeightsBy,
    check_mapping,
)
from harmonica_rt.schedule.site_names import is_module
from harmonica_rt.schedule.weights_text import parse_weights, weights_lines
from harmonica_rt.untrusted import strict_json
from harmonica_rt.untrusted.text import one_line, quoted

FORMAT = "harmonica-schedule"
SET_FORMAT = "harmonica-schedule-set"  # see `schedule_set`
VERSION = 2  # of schedules with weights, spans or the output; others are of version 1, which older readers know
READABLE_VERSIONS = (1, 2)

_REQUIRED = ("format", "version", "steps", "sites", "compute")
_OPTIONAL = ("model", "sampler", "timesteps", "guidance", "made_by")
_NEW = ("weights", "weights_by")  # optional in version 2


class ScheduleFileNotFoundError(ScheduleError, FileNotFoundError):
    """There is no such schedule file, or no bundled schedule of that name."""


def to_text(schedule: ScheduleData) -> str:
    """The file's text: one line per site, per step, and per row of scores. Equal schedules give equal text."""
    fields = [
        f'"format": {_json(FORMAT)}',
        f'"version": {1 if schedule.weights is None and all(map(is_module, schedule.sites)) else VERSION}',
        f'"steps": {schedule.steps}',
        f'"sites": {_lines([_json(site) for site in schedule.sites])}',
        f'"compute": {_lines([_json(_bits(row)) for row in schedule.compute])}',
    ]
    if schedule.weights is not None:
        fields.append(f'"weights": {_lines(weights_lines(schedule))}')
    if (model := schedule.model) is not None:
        names = {"class_name": model.class_name, "config_fingerprint": model.config_fingerprint}
        fields.append(f'"model": {_json({k: v for k, v in names.items() if v is not None}, indent=2)}')
    if (sampler := schedule.sampler) is not None:
        config = check_mapping(sampler.config, "sampler.config").plain()
        fields.append(f'"sampler": {_json({"class_name": sampler.class_name, "config": config}, indent=2)}')
    if schedule.timesteps is not None:
        fields.append(f'"timesteps": {_json(schedule.timesteps)}')
    if schedule.guidance is not None:
        fields.append(f'"guidance": {_json(schedule.guidance)}')
    if schedule.made_by is not None:
        fields.append(f'"made_by": {_made_by_text(schedule.made_by)}')
    if schedule.weights_by is not None:
        fields.append(f'"weights_by": {_made_by_text(schedule.weights_by)}')
    return "{\n" + ",\n".join("  " + field for field in fields) + "\n}\n"


def _made_by_text(made_by: MadeBy | WeightsBy) -> str:
    params = check_mapping(made_by.hyper_parameters, "hyper_parameters").plain()
    fields = [f'"method": {_json(made_by.method)}', f'"hyper_parameters": {_json(params, indent=4)}']
    if isinstance(made_by, MadeBy) and made_by.threshold is not None:
        fields.append(f'"threshold": {_json(made_by.threshold)}')
    if isinstance(made_by, MadeBy) and made_by.scores is not None:
        rows = ["null" if row is None else f"[{', '.join(map(_score, row))}]" for row in made_by.scores]
        fields.append(f'"scores": {_lines(rows, indent=4)}')
    return "{\n" + ",\n".join("    " + field for field in fields) + "\n  }"


def _score(value: float) -> str:
    # fixed decimals as long as they read back exactly; a huge score keeps all its digits
    return f"{value:.{SCORE_DECIMALS}f}" if abs(value) < 1e9 else _json(value)


def _bits(row: NDArray[np.bool_]) -> str:
    return "".join("1" if computes else "0" for computes in row)


def _lines(items: Sequence[str], indent: int = 2) -> str:
    pad = " " * indent
    return "[\n" + ",\n".join(f"{pad}  {item}" for item in items) + f"\n{pad}]" if items else "[]"


def _json(value: object, indent: int | None = None) -> str:
    if indent is None:
        return json.dumps(value, allow_nan=False, sort_keys=True)
    return json.dumps(value, allow_nan=False, sort_keys=True, indent=2).replace("\n", "\n" + " " * indent)


@contextmanager
def named_errors(source: str) -> Iterator[None]:
    """Within this block, a ScheduleError is raised again with the name of the file before its message."""
    try:
        yield
    except ScheduleFileNotFoundError:  # names it already
        raise
    except ScheduleError as error:
        raise ScheduleError(f"{source}: {error}") from error


def read_bytes(path: str) -> bytes:
    """The bytes of a schedule file.

    Raises:
        ScheduleFileNotFoundError: there is no such file.
        ScheduleError: it is a folder, or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ScheduleFileNotFoundError(f"{path}: no such schedule file") from error
    except IsADirectoryError as error:
        raise ScheduleError(
            f"{path}: expected a schedule file, but this is a folder; Schedule.from_pretrained reads folders"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ScheduleError(f"{path}: cannot be read as a schedule file ({error})") from error


def read_object(data: bytes, refusal: str) -> dict[str, Any]:
    """The JSON object in `data`, read strictly.

    Raises:
        ScheduleError: the data is not strict JSON as read by `untrusted.strict_json`, or not an object. The message
            begins with `refusal`.
    """
    try:
        return strict_json.parse_object(data)
    except strict_json.JsonError as error:
        raise ScheduleError(f"{refusal}: {error}") from error


def parse(data: bytes) -> ScheduleFields:
    """The fields of a schedule file, checked for everything that `Schedule` does not check itself.

    Raises:
        ScheduleError: the data is not UTF-8 or not JSON, has duplicate keys, NaN or Infinity, an unsupported format or
            version, missing or unknown fields, wrong types, wrong lengths, or entries other than 0 and 1.
    """
    return parse_object(read_object(data, "not a schedule file"))


def parse_object(document: dict[str, object]) -> ScheduleFields:
    """As `parse`, of an object that was read already."""
    version = _check_header(document)
    check_fields(document, "", _REQUIRED, _OPTIONAL if version == 1 else (*_OPTIONAL, *_NEW))
    sites = check_sites(check_sequence(document["sites"], "sites"))
    if version == 1 and (new := [site for site in sites if not is_module(site)]):
        raise ScheduleError(f"sites: version 1 has no spans and no output, got {quoted(new[0])}; version {VERSION} has")
    fields = ScheduleFields(sites=sites, compute=_parse_compute(document, len(sites)))
    if "model" in document:
        fields["model"] = ModelInfo(**_object(document["model"], "model", ("class_name",), ("config_fingerprint",)))
    if "sampler" in document:
        fields["sampler"] = SamplerInfo(**_object(document["sampler"], "sampler", ("class_name", "config"), ()))
    if "timesteps" in document:
        times = check_sequence(document["timesteps"], "timesteps")
        fields["timesteps"] = tuple(check_number(time, f"timesteps[{i}]") for i, time in enumerate(times))
    if "guidance" in document:
        fields["guidance"] = check_number(document["guidance"], "guidance")
    if "made_by" in document:
        made_by = _object(document["made_by"], "made_by", ("method", "hyper_parameters"), ("threshold", "scores"))
        fields["made_by"] = MadeBy(**made_by)
    if "weights" in document:
        fields["weights"] = parse_weights(document["weights"], fields["compute"], sites)
    if "weights_by" in document:
        weights_by = _object(document["weights_by"], "weights_by", ("method", "hyper_parameters"), ())
        fields["weights_by"] = WeightsBy(**weights_by)
    return fields


def _check_header(document: dict[str, object]) -> int:
    """The version of the file, if it is one of ours that can be read."""
    name, version = document.get("format"), document.get("version")
    if name != FORMAT:
        hint = "ScheduleSet.load reads sets" if name == SET_FORMAT else "this is not a schedule file of harmonica-rt"
        raise ScheduleError(f"format: expected {FORMAT!r}, got {quoted(name)}; {hint}")
    if isinstance(version, bool) or version not in READABLE_VERSIONS or not isinstance(version, int):
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ScheduleError(
            f"version: this harmonica-rt reads versions {readable}, got {quoted(version)}; "
            f"a newer file needs a newer harmonica-rt"
        )
    if version == 1 and (new := [field for field in _NEW if field in document]):
        raise ScheduleError(f"{new[0]}: version 1 has no such field; a file with weights is of version {VERSION}")
    return version


def check_fields(value: dict[str, object], where: str, required: Sequence[str], optional: Sequence[str]) -> None:
    """Raise ScheduleError unless an object has all required fields, no unknown ones, and no null."""
    allowed = (*required, *optional)
    for field in value:
        if field not in allowed:
            near = difflib.get_close_matches(field, [name for name in allowed if name not in value] or allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(allowed)}"
            raise ScheduleError(f"{where}{one_line(field)}: unknown field; {hint}")
    if missing := [field for field in required if field not in value]:
        raise ScheduleError(f"{where}{missing[0]}: missing field; required are {', '.join(required)}")
    for field, entry in value.items():
        if entry is None:
            raise ScheduleError(f"{where}{field}: null; leave the field out when there is nothing to say")


def _object(value: object, field: str, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    # Any: the dataclass that takes the fields checks their types
    if not isinstance(value, dict):
        raise ScheduleError(f"{field}: expected an object, got {strict_json.type_name(value)}")
    check_fields(value, f"{field}.", required, optional)
    return value


def _parse_compute(document: dict[str, object], n_sites: int) -> NDArray[np.bool_]:
    steps, rows = document["steps"], check_sequence(document["compute"], "compute")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ScheduleError(f"steps: expected a whole number of at least 1, got {quoted(steps)}")
    if len(rows) != steps:
        raise ScheduleError(f"compute: expected one string per step ({steps} by the field 'steps'), got {len(rows)}")
    for step, row in enumerate(rows):
        if not isinstance(row, str):
            raise ScheduleError(f"compute, step {step}: expected a string of 0 and 1, got {strict_json.type_name(row)}")
        if other := [c for c in row if c not in "01"]:
            raise ScheduleError(
                f"compute, step {step}: expected only 0 (reuse) and 1 (compute), "
                f"got {other[0]!r} at position {row.index(other[0])}"
            )
        if len(row) != n_sites:
            raise ScheduleError(f"compute, step {step}: expected one entry per site ({n_sites}), got {len(row)}")
    return np.array([[c == "1" for c in str(row)] for row in rows], dtype=np.bool_)
