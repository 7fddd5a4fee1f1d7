"""Sharing through folders and the hub; the hub itself is a stand-in that keeps what it is sent."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import MadeBy, ModelInfo, SamplerInfo
from harmonica_rt.schedule.format import ScheduleFileNotFoundError
from harmonica_rt.schedule.hub import card

SITES = ["blocks.0.attn", "blocks.0.mlp"]


@pytest.fixture
def schedule() -> Schedule:
    made = MadeBy("harmonica", {"target_speedup": 1.5, "iterations": 16})
    model = ModelInfo("DiTTransformer2DModel", "sha256:0123456789abcdef")
    return Schedule.every(2, steps=4, sites=SITES).with_provenance(model=model, guidance=1.5, made_by=made)


def test_a_folder_there_and_back(schedule: Schedule, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    schedule.save_pretrained(folder, base_model="facebook/DiT-XL-2-256")
    assert Schedule.from_pretrained(folder) == schedule
    assert Schedule.from_pretrained(str(folder)) == schedule
    assert {path.name for path in folder.iterdir()} == {"schedule.json", "schedule.png", "README.md"}
    assert (folder / "schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("schedule.json", "expected a folder, but this is a file; Schedule.load reads it"),
        ("no/such/folder", "no such folder, and not a repository id"),
        ("./folder", "no such folder, and not a repository id"),
    ],
)
def test_what_cannot_be_a_repository_is_not_looked_for_in_the_hub(
    name: str, message: str, schedule: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule.save(tmp_path / "schedule.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ScheduleFileNotFoundError, match=message):
        Schedule.from_pretrained(name)


def test_the_card_says_what_it_is_and_how_it_was_made(schedule: Schedule, tmp_path: Path) -> None:
    schedule.save_pretrained(tmp_path, base_model="facebook/DiT-XL-2-256")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "harmonica-rt"
    assert card.data.base_model == "facebook/DiT-XL-2-256"
    for line in ("| reused (CUR) | 50.00% |", "| `attn` | 50.0% |", "| `target_speedup` | `1.5` |", "(schedule.png)"):
        assert line in card.text
    assert "sha256:0123456789abcdef" in card.text


def test_a_schedule_without_provenance_has_a_card(tmp_path: Path) -> None:
    Schedule.from_array([[1, 1], [0, 1]], SITES).save_pretrained(tmp_path)
    assert "made" not in (tmp_path / "README.md").read_text()


def test_a_models_card_stays_and_ours_is_renewed(schedule: Schedule, tmp_path: Path) -> None:
    theirs = "---\nlibrary_name: diffusers\n---\n# A model\n"
    (tmp_path / "README.md").write_text(theirs)
    schedule.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == theirs
    (tmp_path / "README.md").unlink()
    schedule.save_pretrained(tmp_path)
    Schedule.every(4, steps=4, sites=SITES).save_pretrained(tmp_path)
    assert "75.00%" in (tmp_path / "README.md").read_text()


def test_a_file_in_the_place_of_the_folder(schedule: Schedule, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScheduleError, match="expected a folder"):
        schedule.save_pretrained(tmp_path / "file")


def test_no_such_folder_nor_repository(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScheduleFileNotFoundError, match=r"schedule\.json"):
        Schedule.from_pretrained(tmp_path / "empty")
    with pytest.raises(ScheduleFileNotFoundError, match="not a repository id"):
        Schedule.from_pretrained(tmp_path / "none")
    with pytest.raises(ScheduleFileNotFoundError, match=r"some/one: cannot get schedule\.json"):
        Schedule.from_pretrained("some/one", cache_dir=tmp_path, local_files_only=True)


def test_a_repository_from_the_hubs_cache(schedule: Schedule, tmp_path: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--some--one"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    schedule.save_pretrained(repository / "snapshots" / commit)
    options: Any = {"cache_dir": tmp_path, "local_files_only": True}
    assert Schedule.from_pretrained("some/one", **options) == schedule
    shutil.copy(repository / "snapshots" / commit / "schedule.json", repository / "snapshots" / commit / "fast.json")
    assert Schedule.from_pretrained("some/one", filename="fast.json", **options) == schedule


@pytest.mark.parametrize(
    "theirs",
    [b"\xff\xfe not text", b"---\nlibrary_name: [\n---\n", b"---\n- a list\n---\n", b"---\n" + b"[" * 10_000, b""],
    ids=["bytes", "broken-yaml", "list", "deep", "empty"],
)
def test_a_card_that_cannot_be_read_is_left_as_it_is(schedule: Schedule, tmp_path: Path, theirs: bytes) -> None:
    (tmp_path / "README.md").write_bytes(theirs)
    schedule.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == theirs
    assert Schedule.from_pretrained(tmp_path) == schedule


def test_a_schedule_cannot_write_markdown_into_its_card() -> None:
    name = "`a` | <script> [x](http://x)\n\n# y \x1b[2J"
    schedule = Schedule.every(2, steps=2, sites=["a", "0.`x`|y"]).with_provenance(
        model=ModelInfo(name, name), sampler=SamplerInfo(name), made_by=MadeBy(name, {name: name})
    )
    text = card(schedule, None)
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if "script" in line]
    assert len(rows) == 4
    for row in rows:
        left = re.sub(r"\\.", "", re.sub(r"`[^`]*`", "", row))
        assert left.count("|") == 3  # two cells
        assert not set(left) & set("<>[]`#*_")


class Hub:
    """What of `HfApi` a push needs."""

    repositories: dict[str, dict[str, bytes]]
    directory: Path

    def __init__(self, token: str | None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.repositories.setdefault(repo_id, {"private": str(private).encode()})

    def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
        return name in self.repositories[repo_id]

    def hf_hub_download(self, repo_id: str, name: str, *, revision: str | None) -> str:
        path = Path(self.directory) / "theirs.md"
        path.write_bytes(self.repositories[repo_id][name])
        return str(path)

    def upload_folder(self, *, repo_id: str, folder_path: str, revision: str | None, commit_message: str) -> Any:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.repositories[repo_id] |= files
        return SimpleNamespace(commit_url=f"hub/{repo_id}/{commit_message}")


def test_a_push_is_one_commit(schedule: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "repositories", {}, raising=False)
    monkeypatch.setattr(Hub, "directory", tmp_path, raising=False)
    assert schedule.push_to_hub("me/mine", private=True) == "hub/me/mine/Add a cache schedule"
    held = Hub.repositories["me/mine"]
    assert set(held) == {"private", "schedule.json", "schedule.png", "README.md"}
    assert held["private"] == b"True"
    assert json.loads(held["schedule.json"])["steps"] == 4


def test_a_push_leaves_a_models_card(schedule: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = b"---\nlibrary_name: diffusers\n---\n"
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "repositories", {"me/model": {"README.md": theirs}}, raising=False)
    monkeypatch.setattr(Hub, "directory", tmp_path, raising=False)
    schedule.push_to_hub("me/model")
    assert Hub.repositories["me/model"]["README.md"] == theirs
    assert "schedule.json" in Hub.repositories["me/model"]
