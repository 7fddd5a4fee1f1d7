"""Files are written whole or not at all, and a failure names them."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from harmonica_rt import Schedule
from harmonica_rt.demo.picture import draw
from harmonica_rt.errors import ScheduleError, ScheduleWriteError
from harmonica_rt.schedule.files import save_figure, write_atomically
from harmonica_training import Embeddings
from harmonica_training.checkpoint import Checkpoint, save_checkpoint

SCHEDULE = Schedule.every(2, steps=4, sites=["blocks.0.attn", "blocks.0.ff"])


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bringing a file to disk fails as it does where no space is left: without a name in the error."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def picture(path: Path) -> None:
    draw({"row": np.zeros((2, 8, 8, 3), np.float32)}, SCHEDULE, "title", path)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "schedule": ("x.json", SCHEDULE.save),
    "smoothcache": ("x.json", SCHEDULE.save_smoothcache),
    "heat-map": ("x.png", SCHEDULE.plot),
    "demo": ("x.png", picture),
    "embeddings": ("x.safetensors", Embeddings({"prompt_embeds": torch.zeros(2, 3)}).save),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(writer: str, tmp_path: Path, full_disk: None) -> None:
    name, write = WRITERS[writer]
    path = tmp_path / name
    path.write_text("the old one")
    with pytest.raises(OSError, match="No space left") as caught:
        write(path)
    assert caught.value.filename == str(path)
    assert [found.name for found in tmp_path.iterdir()] == [name]
    assert path.read_text() == "the old one"


def test_a_full_disk_in_save_pretrained(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        SCHEDULE.save_pretrained(tmp_path / "folder")
    assert caught.value.filename == str(tmp_path / "folder" / "schedule.json")
    assert not list((tmp_path / "folder").iterdir())


def test_a_full_disk_under_a_checkpoint(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(tmp_path, Checkpoint(3, {"logits": torch.zeros(2)}, {}))
    assert caught.value.filename == str(tmp_path / "iteration-000003.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_may_not_be_written_in_is_told_by_the_files_own_name(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "x.json"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(path, "text")
    assert caught.value.filename == str(path)


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    link = tmp_path / "x.json"
    link.symlink_to(tmp_path / "scratch" / "there.json")
    write_atomically(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "scratch" / "there.json").read_text() == "text"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "text")
        assert os.read(descriptor, 100) == b"text"
    finally:
        os.close(descriptor)
    assert pipe.is_fifo()
    with pytest.raises(IsADirectoryError) as caught:
        write_atomically(tmp_path, "text")
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize(("name", "written"), [("a.svg", "a.svg"), ("a", "a.png"), ("a.", "a.png"), ("a.PNG", "a.PNG")])
def test_the_format_of_a_picture_follows_its_name(name: str, written: str, tmp_path: Path) -> None:
    save_figure(Figure(figsize=(1, 1)), tmp_path / name)
    (found,) = tmp_path.iterdir()
    assert found.name == written
    assert found.read_bytes().startswith(b"<?xml" if name.endswith("svg") else b"\x89PNG")


@pytest.mark.parametrize("write", [SCHEDULE.save, SCHEDULE.save_smoothcache], ids=["save", "smoothcache"])
@pytest.mark.parametrize(
    ("place", "kind"),
    [("missing/x.json", FileNotFoundError), ("folder", IsADirectoryError), ("file/x.json", NotADirectoryError)],
)
def test_a_schedule_that_cannot_be_written_raises_our_error_and_the_built_in_one(
    write: Callable[[Path], object], place: str, kind: type[OSError], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ScheduleWriteError, match=f"{place}: cannot be written") as caught:
        write(tmp_path / place)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert isinstance(error, kind)
        assert isinstance(error, ScheduleError)
        assert error.filename == str(tmp_path / place)
