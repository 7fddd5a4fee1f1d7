"""Router checkpoints, made here in the layouts of the released trainers: order of rows, rules by kind, refusals."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import ModelInfo, Schedule

DEPTH, STEPS = 2, 4  # sites: attention and MLP of two blocks
L2C_ARGS = {"data_path": "/data", "model": "DiT-XL/2", "num_sampling_steps": STEPS, "l1": 5e-6, "lr": 0.001}
HARMONICA_ARGS = {"model": "DiT-XL/2", "num_sampling_steps": STEPS, "l1": 7e-8, "cfg_scale": 1.5, "lambda_c": 500}
REUSE, COMPUTE = -4.0, 4.0

Rows = dict[int, torch.Tensor]


def rows_of(*bits: str) -> Rows:
    """Row i of the file from its digits, 1 = a logit over any threshold."""
    return {i: torch.tensor([COMPUTE if c == "1" else REUSE for c in row]) for i, row in enumerate(bits)}


def state(rows: Rows) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((f"{i}.prob", row) for i, row in rows.items())


def save(path: Path, rows: Rows, args: dict[str, object] | None) -> Path:
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4))]).state_dict()
    content = {"routers": state(rows), "opt": optimiser}
    torch.save(content if args is None else {**content, "args": argparse.Namespace(**args)}, path)
    return path


def harmonica_rows() -> Rows:
    return {**rows_of("0001", "0010", "1100"), 3: torch.full((4,), 5.0)}


def bits(schedule: Schedule) -> list[str]:
    return ["".join("01"[int(c)] for c in row) for row in schedule.compute]


def test_harmonica_runs_the_last_row_first(tmp_path: Path) -> None:
    schedule = Schedule.from_router(save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS))
    assert bits(schedule) == ["1111", "1100", "0010", "0001"]
    assert schedule.sites[:3] == ("transformer_blocks.0.attn1", "transformer_blocks.0.ff", "transformer_blocks.1.attn1")
    assert schedule.model == ModelInfo("DiTTransformer2DModel")
    assert schedule.guidance == 1.5
    made = schedule.made_by
    assert made is not None
    assert (made.method, made.threshold) == ("harmonica", 0.1)
    assert dict(made.hyper_parameters) == {"model": "DiT-XL/2", "l1": 7e-8, "cfg_scale": 1.5, "lambda_c": 500}
    assert made.scores == ((5.0,) * 4, (4, 4, -4, -4), (-4, -4, 4, -4), (-4, -4, -4, 4))


def test_learning_to_cache_computes_all_at_odd_rows(tmp_path: Path) -> None:
    # rows 1 and 3 are untrained noise: here they would reuse everything
    rows = rows_of("0001", "0000", "1100", "0000")
    schedule = Schedule.from_router(save(tmp_path / "r.pt", rows, L2C_ARGS))
    assert bits(schedule) == ["1111", "1100", "1111", "0001"]
    made = schedule.made_by
    assert made is not None
    assert made.method == "learning-to-cache"
    assert "data_path" not in made.hyper_parameters
    assert made.scores == (None, (4, 4, -4, -4), None, (-4, -4, -4, 4))


def test_uvit_rows_run_forwards_and_serve_every_other_evaluation(tmp_path: Path) -> None:
    # three blocks, so an odd depth; row 0 and rows 3 to 5 are untrained
    rows = rows_of("000000", "110000", "000011", "000000", "000000", "000000")
    torch.save(state(rows), tmp_path / "r.pth")
    schedule = Schedule.from_router(tmp_path / "r.pth")
    assert bits(schedule) == ["111111", "111111", "110000", "111111", "000011", "111111"]
    assert schedule.sites == (
        "in_blocks.0.attn", "in_blocks.0.mlp", "mid_block.attn", "mid_block.mlp",
        "out_blocks.0.attn", "out_blocks.0.mlp",
    )  # fmt: skip
    assert schedule.made_by is not None
    assert schedule.made_by.threshold == 0.9  # that of the released command


def test_threshold_is_strict_and_moves_the_mask(tmp_path: Path) -> None:
    rows = {**harmonica_rows(), 0: torch.tensor([-2.3, -2.1, 0.0, 2.0])}  # sigmoid: 0.091, 0.109, 0.5, 0.881
    path = save(tmp_path / "r.pt", rows, HARMONICA_ARGS)
    last = {tau: bits(Schedule.from_router(path, threshold=tau))[-1] for tau in (0.05, 0.1, 0.5, 0.9)}
    assert last == {0.05: "1111", 0.1: "0111", 0.5: "0001", 0.9: "0000"}


def test_sites_and_steps_may_be_given(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS)
    schedule = Schedule.from_router(path, sites=["a.attn", "a.mlp", "b.attn", "b.mlp"], steps=4)
    assert schedule.sites == ("a.attn", "a.mlp", "b.attn", "b.mlp")
    assert schedule.model is None


def test_half_precision_and_parameters_are_read(tmp_path: Path) -> None:
    rows = {i: torch.nn.Parameter(row.half()) for i, row in harmonica_rows().items()}
    assert bits(Schedule.from_router(save(tmp_path / "r.pt", rows, HARMONICA_ARGS)))[1] == "1100"


def test_imported_schedule_survives_its_file(tmp_path: Path) -> None:
    schedule = Schedule.from_router(save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS))
    schedule.save(tmp_path / "s.json")
    assert Schedule.load(tmp_path / "s.json") == schedule


NOISE = rows_of("0101", "0101", "0101", "0101")
KINDS = {
    "harmonica-args": (harmonica_rows(), HARMONICA_ARGS, "harmonica"),
    "fixed-row-no-args": (harmonica_rows(), None, "harmonica"),
    "images-args": (NOISE, L2C_ARGS, "learning-to-cache"),
}
UNTOLD = {
    "no-args": (NOISE, None),
    "strange-args": (NOISE, {"lr": 0.1}),
    "harmonica-args-free-row": (NOISE, HARMONICA_ARGS),
    "images-args-fixed-row": (harmonica_rows(), L2C_ARGS),
}


@pytest.mark.parametrize(("rows", "args", "method"), KINDS.values(), ids=KINDS)
def test_kind_is_told(tmp_path: Path, rows: Rows, args: dict[str, object] | None, method: str) -> None:
    schedule = Schedule.from_router(save(tmp_path / "r.pt", rows, args))
    assert schedule.made_by is not None
    assert schedule.made_by.method == method


@pytest.mark.parametrize(("rows", "args"), UNTOLD.values(), ids=UNTOLD)
def test_kind_is_asked_for_when_it_cannot_be_told(tmp_path: Path, rows: Rows, args: dict[str, object] | None) -> None:
    path = save(tmp_path / "r.pt", rows, args)
    with pytest.raises(
        ScheduleError, match=r"cannot tell which code wrote this file.*pass kind='harmonica', 'l2c-dit'"
    ):
        Schedule.from_router(path)
    assert Schedule.from_router(path, kind="l2c-dit").steps == 4


def test_bare_state_dict_of_even_depth_is_asked_about(tmp_path: Path) -> None:
    torch.save(state(NOISE), tmp_path / "r.pth")
    with pytest.raises(ScheduleError, match="cannot tell which code wrote this file"):
        Schedule.from_router(tmp_path / "r.pth")
    with pytest.raises(ScheduleError, match="a U-ViT has an odd number of blocks, got 2"):
        Schedule.from_router(tmp_path / "r.pth", kind="l2c-uvit")


def test_wrong_arguments(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS)
    with pytest.raises(ScheduleError, match="has routers for 4 steps, but steps=20 was asked for"):
        Schedule.from_router(path, steps=20)
    with pytest.raises(ScheduleError, match=r"are for 2 blocks \(4 sites\), but 2 sites were given"):
        Schedule.from_router(path, sites=["a", "b"])
    with pytest.raises(ScheduleError, match=r"threshold: expected 0 <= threshold < 1, got 1\.5"):
        Schedule.from_router(path, threshold=1.5)
    with pytest.raises(ScheduleError, match="kind: expected one of auto, harmonica, l2c-dit, l2c-uvit, got 'l2c'"):
        Schedule.from_router(path, kind="l2c")  # type: ignore[arg-type]


def test_harmonica_whose_first_step_reuses_is_of_another_kind(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", NOISE, L2C_ARGS)
    with pytest.raises(ScheduleError, match=r"row 3 runs first and must compute all sites, but 2 of 4 scores are"):
        Schedule.from_router(path, kind="harmonica")


def test_learning_to_cache_pairs_its_steps(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", rows_of("01", "01", "01"), {**L2C_ARGS, "num_sampling_steps": 3})
    with pytest.raises(ScheduleError, match="pairs the steps, so their number must be even, got 3"):
        Schedule.from_router(path)


ODD_FILES = {
    "a-list": ([1, 2], "expected a router checkpoint (a dict), got list"),
    "routers-none": ({"routers": None}, "expected router logits under 'routers', got NoneType"),
    "routers-empty": ({"routers": {}}, "expected router logits under 'routers'"),
    "other-keys": (
        {"routers": {"blocks.0.weight": torch.ones(4)}},
        "expected keys '0.prob', '1.prob', ..., got 'blocks.0",
    ),
    "missing-row": ({"routers": state({0: torch.ones(4), 3: torch.ones(4)})}, "expected rows 0 ... 3, missing 1, 2"),
    "ragged": (
        {"routers": state({0: torch.ones(4), 1: torch.ones(6)})},
        "rows must be equally long; row 0 has 4 logits, row 1 has 6",
    ),
    "odd-width": ({"routers": state({0: torch.ones(3)})}, "two logits per block (attention, MLP), got 3 in a row"),
    "no-width": ({"routers": state({0: torch.ones(0)})}, "two logits per block (attention, MLP), got 0 in a row"),
    "integers": (
        {"routers": state({0: torch.ones(4, dtype=torch.int64)})},
        "routers['0.prob']: expected a row of floating-point logits, got shape (4,), dtype torch.int64",
    ),
    "matrix": ({"routers": state({0: torch.ones(2, 2)})}, "expected a row of floating-point logits, got shape (2, 2)"),
    "number": ({"routers": {"0.prob": 3.0}}, "routers['0.prob']: expected a tensor of logits, got float"),
    "nan": ({"routers": state({0: torch.ones(4), 1: torch.full((4,), torch.nan)})}, "row 1 is not finite"),
}


def odd_rows() -> dict[str, tuple[object, str]]:
    """Tensors that are no rows of logits, each with what is said of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse, nested and quantised tensors come with advice
        return {
            "expanded": (
                torch.ones(1).expand(2**20),
                "1048576 numbers with stride 0 and offset 0 are not a part of the 1 that are stored",
            ),
            "687-gigabytes": (torch.ones(1).expand(171_000_000_000), "171000000000 logits are more than any model has"),
            "sparse": (torch.ones(4).to_sparse(), "got what torch._utils._rebuild_sparse_tensor makes"),
            "sparse-rows": (torch.ones(4, 4).to_sparse_csr(), "got what torch._utils._rebuild_sparse_tensor makes"),
            "meta": (torch.ones(4, device="meta"), "got what torch._utils._rebuild_meta_tensor_no_storage makes"),
            "huge-meta": (torch.ones(10**15, device="meta"), "_rebuild_meta_tensor_no_storage makes"),
            "nested": (
                torch.nested.nested_tensor([torch.ones(2)]),
                "got what torch._utils._rebuild_nested_tensor makes",
            ),
            "quantised": (torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "_rebuild_qtensor makes"),
            "float8": (torch.ones(4).to(torch.float8_e4m3fn), "got what torch._utils._rebuild_tensor_v3 makes"),
            "negative-view": (torch.ones(4, dtype=torch.complex64).conj().imag, "not simply a shape over a storage"),
            "complex": (torch.ones(4, dtype=torch.complex64), "got shape (4,), dtype torch.complex64"),
            "bool": (torch.ones(4, dtype=torch.bool), "got shape (4,), dtype torch.bool"),
            "scalar": (torch.ones(()), "got shape (), dtype torch.float32"),
            "infinite": (torch.full((4,), torch.inf), "row 0 is not finite"),
            "beyond-fp32": (torch.full((4,), 1e300, dtype=torch.float64), "row 0 is not finite"),
        }


ODD_FILES |= {name: ({"routers": {"0.prob": row}}, message) for name, (row, message) in odd_rows().items()}


@pytest.mark.parametrize(("content", "message"), ODD_FILES.values(), ids=ODD_FILES)
def test_malformed_checkpoint(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "r.pt")
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        Schedule.from_router(tmp_path / "r.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'r.pt'}: ")


def test_rows_that_the_args_promise_and_the_file_lacks(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", harmonica_rows(), {**HARMONICA_ARGS, "num_sampling_steps": 20})
    with pytest.raises(ScheduleError, match=r"expected rows 0 ... 19, missing 4, 5, 6, 7, 8, 9, 10, 11, \.\.\."):
        Schedule.from_router(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such router checkpoint") as caught:
        Schedule.from_router(tmp_path / "none.pt")
    assert isinstance(caught.value, ScheduleError)


@pytest.mark.parametrize(
    "data", [b"", b"hello world\n", b"PK\x03\x04rest", b'{"a": 1}'], ids=["empty", "text", "zip", "json"]
)
def test_no_checkpoint_at_all(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "r.pt").write_bytes(data)
    with pytest.raises(ScheduleError, match="not a readable torch checkpoint"):
        Schedule.from_router(tmp_path / "r.pt")


def test_damaged_checkpoint(tmp_path: Path) -> None:
    data = save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS).read_bytes()
    (tmp_path / "r.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ScheduleError, match="not a readable torch checkpoint"):
        Schedule.from_router(tmp_path / "r.pt")


class Payload:
    """Unpickled by the full unpickler, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("layout", ["zip", "legacy", "plain-pickle", "in-args"])
def test_pickle_that_would_run_code_is_refused(tmp_path: Path, layout: str) -> None:
    path, target = tmp_path / "r.pt", tmp_path / "broken-in"
    content = {"routers": state(harmonica_rows()), "opt": Payload(target)}
    if layout == "in-args":
        content = {"routers": state(harmonica_rows()), "args": argparse.Namespace(lambda_c=Payload(target))}
    if layout == "plain-pickle":
        path.write_bytes(pickle.dumps({"opt": Payload(target)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout != "legacy")
    with pytest.raises(ScheduleError, match=r"refused\. Only tensors, plain values .* asks for \w+\.mkdir"):
        Schedule.from_router(path)
    assert not target.exists()


def test_the_payload_of_that_test_is_live(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def test_reading_leaves_the_safe_list_of_torch_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    Schedule.from_router(save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS))
    assert set(torch.serialization.get_safe_globals()) == before


def test_files_of_the_tests_are_zip_archives_like_the_released_ones(tmp_path: Path) -> None:
    assert zipfile.is_zipfile(save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS))


def test_logits_from_a_gpu_are_read_on_a_cpu(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS)
    other = tmp_path / "cuda.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w", zipfile.ZIP_STORED) as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith("data.pkl"):
                # the storage's place, a pickled string of length 3, becomes one of length 6
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(item, data)
    assert np.array_equal(Schedule.from_router(other).compute, Schedule.from_router(path).compute)


def test_an_expanded_row_costs_no_memory(tmp_path: Path) -> None:
    rows = {f"{row}.prob": torch.ones(1).expand(10**6) for row in range(1, 10)}
    torch.save({"routers": {**rows, "0.prob": torch.ones(1).expand(10**11)}}, tmp_path / "r.pt")
    tracemalloc.start()
    with pytest.raises(ScheduleError, match="rows must be equally long"):
        Schedule.from_router(tmp_path / "r.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_many_rows_of_one_large_storage_are_too_many(tmp_path: Path) -> None:
    shared = torch.ones(4096)
    torch.save({"routers": {f"{row}.prob": shared for row in range(1000)}}, tmp_path / "r.pt")
    with pytest.raises(ScheduleError, match="1000 rows of 4096 logits are more than any model has; at most 1048576"):
        Schedule.from_router(tmp_path / "r.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_may_be_views_of_any_floating_type(tmp_path: Path, dtype: torch.dtype) -> None:
    learned = torch.tensor([-4.25, 9.0, 1.3, 9.0, -0.1, 9.0, 4.0, 9.0], dtype=dtype)
    rows = {0: learned[::2], 1: torch.full((9,), 5.0, dtype=dtype)[3:7]}
    made = Schedule.from_router(save(tmp_path / "r.pt", rows, HARMONICA_ARGS | {"num_sampling_steps": 2})).made_by
    assert made is not None
    assert made.scores == ((5.0,) * 4, tuple(round(value, 4) for value in learned[::2].float().tolist()))


def rewritten(path: Path, edit: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    edit(entries)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def test_what_unpacks_to_more_than_its_size_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS)
    rewritten(path, lambda entries: entries.update({"r/data/0": bytes(2**24)}), zipfile.ZIP_DEFLATED)
    with pytest.raises(ScheduleError, match=r"r\.pt: not a readable torch checkpoint: it holds compressed entries"):
        Schedule.from_router(path)


def test_numbers_that_the_file_lacks(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS)
    rewritten(path, lambda entries: entries.pop("r/data/1"))
    with pytest.raises(ScheduleError, match=r"routers\['1\.prob'\]: its numbers are not in the file"):
        Schedule.from_router(path)


def test_numbers_of_a_big_endian_machine(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", harmonica_rows(), HARMONICA_ARGS)
    expected = Schedule.from_router(path)

    def swap(entries: dict[str, bytes]) -> None:
        entries["r/byteorder"] = b"big"
        for name in [name for name in entries if name.startswith("r/data/")]:
            entries[name] = np.frombuffer(entries[name], "<f4").astype(">f4").tobytes()

    assert Schedule.from_router(rewritten(path, swap)) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lr": float("nan")}, "args: made_by.hyper_parameters.lr: expected a finite number, got nan"),
        ({"lr": 10**5000}, "args: made_by.hyper_parameters.lr: expected a number of at most 400 digits"),
        ({"cfg_scale": "1.5"}, "args.cfg_scale: expected a number, got '1.5'"),
        ({"model": "\ud800"}, "args: made_by.hyper_parameters.model: expected text that UTF-8 can write"),
    ],
)
def test_args_that_no_schedule_can_keep(tmp_path: Path, args: dict[str, object], message: str) -> None:
    path = save(tmp_path / "r.pt", harmonica_rows(), {**HARMONICA_ARGS, **args})
    with pytest.raises(ScheduleError, match=re.escape(f"{path}: {message}")):
        Schedule.from_router(path)


@pytest.mark.parametrize("key", ["\x1b[2J", 3, 1.5, None, ("0.prob",), "0.prob\n", "0" * 10_000], ids=ascii)
def test_keys_that_are_no_rows(tmp_path: Path, key: object) -> None:
    torch.save({"routers": {key: torch.ones(4)}}, tmp_path / "r.pt")
    with pytest.raises(ScheduleError, match=r"expected keys '0\.prob'|a dict with the key \('0\.prob',\)") as caught:
        Schedule.from_router(tmp_path / "r.pt")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_file_of_torch_before_1_6_is_told_from_a_forged_one(tmp_path: Path) -> None:
    torch.save({"routers": state(harmonica_rows())}, tmp_path / "r.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ScheduleError, match=r"not a zip archive as torch\.save has written since torch 1\.6"):
        Schedule.from_router(tmp_path / "r.pt")
