"""Schedules in a folder or a Hugging Face hub repository: the file, its picture, and a card.

`huggingface_hub` is imported by the functions that need it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import Any

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import heat_map
from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.format import ScheduleFileNotFoundError, to_text
from harmonica_rt.schedule.panels import weights_in_words
from harmonica_rt.schedule.provenance import check_mapping
from harmonica_rt.schedule.writing import write_file
from harmonica_rt.untrusted.text import one_line

FILE, PICTURE, CARD = "schedule.json", "schedule.png", "README.md"
LIBRARY = "harmonica-rt"  # `library_name` of our cards
_IN_CODE = str.maketrans({"`": "'", "|": r"\|"})  # what would end code or a table cell in Markdown
_WEIGHTS = """A reused output is a weighted sum of the latest computed ones; the schedule has the weights.
"""


def find_file(repo_or_dir: str | os.PathLike[str], filename: str, **download: Any) -> str:
    """The path of a schedule file in a folder, or in the hub's cache, where it is downloaded if needed.

    Args:
        repo_or_dir: a folder, or the id of a repository, `owner/name`.
        filename: name of the file within it.
        download: further arguments of `huggingface_hub.hf_hub_download`: `revision`, `token`, `cache_dir`,
            `local_files_only`, ...

    Raises:
        ScheduleFileNotFoundError: there is no such folder or repository, or no such file in it; or the hub cannot be
            reached and the file is not in the cache.
    """
    if not isinstance(repo_or_dir, str | os.PathLike) or not os.fspath(repo_or_dir):
        raise ScheduleError(f"expected a folder or the id of a repository (owner/name), got {repo_or_dir!r}")
    folder = Path(repo_or_dir)
    if folder.is_dir():
        return str(folder / filename)
    if folder.exists():
        raise ScheduleFileNotFoundError(f"{repo_or_dir}: expected a folder, but this is a file; Schedule.load reads it")
    if len(folder.parts) > 2 or os.fspath(repo_or_dir).startswith((".", "~", os.sep)):
        raise ScheduleFileNotFoundError(f"{repo_or_dir}: no such folder, and not a repository id (owner/name)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        path: str = hf_hub_download(os.fspath(repo_or_dir), filename, **download)
    except HFValidationError as error:
        raise ScheduleFileNotFoundError(f"{repo_or_dir}: no such folder, and not a repository id: {error}") from error
    except OSError as error:  # anything that the hub refuses, or that keeps us from reaching it
        raise ScheduleFileNotFoundError(f"{repo_or_dir}: cannot get {filename} from the hub: {error}") from error
    return path


def write_folder(schedule: ScheduleData, folder: str | os.PathLike[str], base_model: str | None) -> None:
    """Write the schedule, its picture and its card; a card of another library is left unchanged."""
    target = Path(folder)
    if target.is_file():
        raise ScheduleError(f"{target}: expected a folder, but this is a file; `save` writes single files")
    target.mkdir(parents=True, exist_ok=True)
    write_file(target / FILE, to_text(schedule))
    heat_map.plot(schedule, target / PICTURE)
    if not (target / CARD).exists() or is_ours((target / CARD).read_bytes()):
        write_file(target / CARD, card(schedule, base_model))


def push(
    schedule: ScheduleData,
    repo_id: str,
    *,
    base_model: str | None,
    private: bool | None,
    token: str | None,
    revision: str | None,
    message: str,
) -> str:
    """Upload the schedule, its picture and its card in one commit; returns the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(schedule, folder, base_model)
        if api.file_exists(repo_id, CARD, revision=revision):
            theirs = api.hf_hub_download(repo_id, CARD, revision=revision)
            if not is_ours(Path(theirs).read_bytes()):
                (Path(folder) / CARD).unlink()
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    return str(commit.commit_url)


def is_ours(card: bytes) -> bool:
    """Whether this library wrote the card; False for an unreadable one.

    The header is scanned line by line, not parsed: untrusted YAML may be huge, or raise errors of any kind.
    """
    first, *lines = card.decode("utf-8", "replace").splitlines() or [""]
    return first == "---" and f"library_name: {LIBRARY}" in takewhile(lambda line: line != "---", lines)


def card(schedule: ScheduleData, base_model: str | None) -> str:
    """The card in Markdown: what the schedule saves, what it was made for and how, and how to use it."""
    from huggingface_hub import ModelCardData

    header = ModelCardData(library_name=LIBRARY, base_model=base_model, tags=["diffusion", "feature-caching"])
    kinds = [[_code(kind), f"{cur:.1%}"] for kind, cur in schedule.cur_per_kind().items()]
    figures = [
        ["steps", str(schedule.steps)],
        ["sites", str(len(schedule.sites))],
        ["reused (CUR)", f"{schedule.cur:.2%}"],
        ["different steps", str(schedule.patterns)],
    ]
    if schedule.weights is not None:
        figures.append(["weights", _plain(weights_in_words(schedule))])
    made_for = []
    if schedule.model is not None:
        fingerprint = schedule.model.config_fingerprint
        made_for.append(
            ["model", _code(schedule.model.class_name) + (f", config {_code(fingerprint)}" if fingerprint else "")]
        )
    if schedule.sampler is not None:
        made_for.append(["sampler", _code(schedule.sampler.class_name)])
    if schedule.guidance is not None:
        made_for.append(["guidance", f"{schedule.guidance:g}"])
    if schedule.made_by is not None:
        made_for.append(["method", _plain(schedule.made_by.method)])
        parameters = check_mapping(schedule.made_by.hyper_parameters, "hyper_parameters").plain()
        made_for += [[_code(name), _code(json.dumps(value))] for name, value in sorted(parameters.items())]
    return "\n".join(
        [
            f"---\n{header.to_yaml()}\n---\n",
            "# A static cache schedule\n",
            "Which attention and feed-forward outputs of a Diffusion Transformer to compute at every denoising step,",
            "and which to reuse from an earlier one. harmonica-rt runs it.\n",
            *([_WEIGHTS] if schedule.weights is not None else []),
            f"![Steps down, sites across; dark is computed, light is reused]({PICTURE})\n",
            _table("figure", "", figures),
            _table("kind of site", "reused", kinds),
            *([_table("made", "", made_for)] if made_for else []),
            "```python",
            "import harmonica_rt as hrt\n",
            'schedule = hrt.Schedule.from_pretrained("this repository or folder")',
            "hrt.compile(pipe, schedule)",
            "```\n",
        ]
    )


def _code(text: str) -> str:
    """Text from a schedule as code in a table cell, escaped so that it cannot end the code, the cell or the line."""
    return f"`{one_line(text, 1000).translate(_IN_CODE)}`"


def _plain(text: str) -> str:
    """Text from a schedule for a table cell, with its Markdown and HTML escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", one_line(text, 1000))


def _table(left: str, right: str, rows: list[list[str]]) -> str:
    return "\n".join(f"| {a} | {b} |" for a, b in [[left, right], ["---", "---"], *rows]) + "\n"
