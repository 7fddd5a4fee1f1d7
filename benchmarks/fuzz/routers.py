"""Router checkpoints, read by `Schedule.from_router`.

They are damaged on three levels: tensors that are not rows of logits, changed numbers and names in the pickle, and
changes of the archive around it.
"""

from __future__ import annotations

import argparse
import io
import os
import pickletools
import warnings
import zipfile
from functools import cache
from random import Random
from typing import Any

import torch

from benchmarks.fuzz import schedules
from benchmarks.fuzz.format import Format, garbled
from benchmarks.fuzz.json_damage import ODD_NUMBERS, ODD_TEXT, odd_value
from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleError


def content(rng: Random) -> dict[str, Any]:
    """A valid checkpoint of HarmoniCa: its last row is fixed, the others are learned."""
    steps, width = 2 * rng.randint(1, 4), 2 * rng.randint(1, 3)
    rows = {f"{step}.prob": torch.tensor([rng.gauss(0, 3) for _ in range(width)]) for step in range(steps - 1)}
    rows[f"{steps - 1}.prob"] = torch.full((width,), 5.0)
    args = argparse.Namespace(model="DiT-XL/2", num_sampling_steps=steps, l1=7e-8, cfg_scale=1.5, lambda_c=500)
    return {"routers": rows, "opt": {"state": {0: {"step": torch.tensor(3.0)}}}, "args": args}


def saved(value: object, **options: Any) -> bytes:
    """The bytes that `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


class _Payload:
    """A value that makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harmonica-fuzz-was-here",)


@cache
def _odd_tensors() -> tuple[Any, ...]:
    """Values that are not rows of logits."""
    one = torch.ones(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse, nested and quantised tensors come with advice
        return (
            one.expand(171_000_000_000),
            one.as_strided((4, 4), (0, 0)),
            torch.ones(4, 4).to_sparse(),
            torch.ones(4).to_sparse(),
            torch.ones(4, 4).to_sparse_csr(),
            torch.empty(10**12, device="meta"),
            torch.empty(4, device="meta"),
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
            torch.ones(4).to(torch.float8_e4m3fn),
            *(torch.ones(4, dtype=dtype) for dtype in (torch.complex64, torch.int64, torch.bool, torch.uint8)),
            *(torch.ones(4, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
            torch.ones(4).bool().logical_not(),
            torch.full((4,), float("nan")),
            torch.full((4,), float("inf")),
            torch.full((4,), 1e300, dtype=torch.float64),
            torch.arange(8.0)[::2],
            torch.arange(8.0)[3:7],
            torch.ones(4, dtype=torch.complex64).conj().imag,
            torch.nn.Parameter(torch.ones(4)),
            torch.ones(0),
            torch.ones(()),
            torch.ones(4, 1),
            torch.ones(3),
            [1.0, 1.0],
            1.0,
            None,
        )


def damaged(rng: Random) -> bytes:
    """A checkpoint with one of its parts replaced, its pickle edited, its archive written otherwise, or garbled."""
    match rng.randrange(6):
        case 0 | 1:
            return saved(_other_content(rng, content(rng)))
        case 2 | 3:
            return _archive(rng, _edited_pickle(rng, saved(content(rng))))
        case 4:
            return saved(content(rng), _use_new_zipfile_serialization=False)
        case _:
            return garbled(rng, saved(content(rng)))


def _other_content(rng: Random, value: dict[str, Any]) -> object:
    rows: dict[Any, Any] = value["routers"]
    for _ in range(rng.choice((1, 1, 2))):
        match rng.randrange(8):
            case 0 | 1 | 2:
                rows[rng.choice([*rows, "7.prob"])] = rng.choice(_odd_tensors())
            case 3:
                rows[rng.choice((3, 1.5, None, "prob", "01.prob", "-1.prob", "999999.prob", "٣.prob", *ODD_TEXT))] = (
                    rng.choice(list(rows.values()))
                )
            case 4 if len(rows) > 1:
                del rows[rng.choice(list(rows))]
            case 5:
                setattr(value["args"], rng.choice(("num_sampling_steps", "cfg_scale", "lr", "model")), odd_value(rng))
            case 6:
                name = rng.choice(("opt", "args", "routers", "more"))
                value[name] = rng.choice((_Payload(), odd_value(rng), rng.choice(_odd_tensors()), [[rows]]))
                if not isinstance(value["args"], argparse.Namespace):
                    return value
            case _:
                return rng.choice((rows, list(rows), {"routers": value}, rng.choice(_odd_tensors()), odd_value(rng)))
        if not isinstance(value["routers"], dict):
            return value
    return value


_NAMES = (
    b"cposix\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nTensor\n", b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"cbuiltins\nbytearray\n", b"ctorch._utils\n_rebuild_nested_tensor\n", b"ctorch\nHalfStorage\n",
    b"ctorch\nComplexDoubleStorage\n", b"ctorch\nfloat32\n", b"ctorch\n\x1b[2J\n",
)  # fmt: skip


def _edited_pickle(rng: Random, data: bytes) -> dict[str, bytes]:
    """The entries of an archive whose pickle has changed numbers, texts, names or opcodes in a few places."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("/data.pkl"))
    for _ in range(rng.choice((1, 1, 2, 4))):
        pickled = entries[name]
        places = [(opcode.name, at) for opcode, _, at in _opcodes(pickled)]
        if len(places) < 2:
            break
        index = rng.randrange(len(places) - 1)
        (kind, at), (_, end) = places[index], places[index + 1]
        if kind.startswith("BININT"):
            new = _pickled_number(rng)
        elif kind == "GLOBAL":
            new = rng.choice(_NAMES)
        elif kind == "BINUNICODE":
            text = rng.choice((*ODD_TEXT, "0", "cuda:0", "data/0", "../0")).encode("utf-8", "surrogatepass")
            new = b"X" + len(text).to_bytes(4, "little") + text
        else:
            new = rng.choice(
                (b"", b"N", b")", b"}", b"]", b"0", b"2", b"(", b"R", b"\x81", b"b", b"Q", b"s", b"\x96" + b"\xff" * 8)
            )
        entries[name] = pickled[:at] + new + pickled[end:]
    if rng.random() < 0.2:
        del entries[rng.choice(list(entries))]
    return entries


def _opcodes(pickled: bytes) -> list[Any]:
    try:
        return list(pickletools.genops(pickled))
    except ValueError:  # an earlier edit made it unreadable
        return []


def _pickled_number(rng: Random) -> bytes:
    number = rng.choice([*(number for number in ODD_NUMBERS if isinstance(number, int)), 10**6000, 171_000_000_000])
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + len(data).to_bytes(4, "little") + data


def _archive(rng: Random, entries: dict[str, bytes]) -> bytes:
    """A zip file of the entries; sometimes it is compressed or has an entry twice."""
    kind = rng.choice((zipfile.ZIP_STORED,) * 8 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an entry that occurs twice
            for name, data in entries.items():
                archive.writestr(name, data)
                if rng.random() < 0.01:
                    archive.writestr(name, data)
        if kind != zipfile.ZIP_STORED:
            archive.writestr("bomb", bytes(10**6))
    return file.getvalue()


FORMAT = Format(
    name="router",
    file="router.pt",
    errors=(ScheduleError,),
    valid=lambda rng: saved(content(rng)),
    damaged=damaged,
    read=Schedule.from_router,
    check=schedules.check,
)
