"""The latency benchmark at tiny size: rows, the gate, equal work for peers, and models left as they were."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

pytest.importorskip("diffusers", reason="the models are diffusers'")

from diffusers import FluxTransformer2DModel

from benchmarks import models
from benchmarks import rows as benchmark_rows
from benchmarks.latency import alone, figures, floor, gate, measure, nvml, results, show
from benchmarks.latency.cases import Case, Geometry, Task, case_of, geometries, schedules_of
from benchmarks.latency.providers import PROVIDERS
from benchmarks.latency.providers.base import Provider, Role, Runner, evenly, fewest_computed
from benchmarks.latency.providers.cache_dit import CacheDit
from benchmarks.latency.run import WARM_UPS, measure_task
from benchmarks.latency.settings import Settings
from harmonica_rt.call.roles import roles
from harmonica_rt.lower import lower
from harmonica_rt.options import HOISTED

STEPS = 4
CPU = torch.device("cpu")
PUBLISHED = benchmark_rows.RESULTS / "latency-cpu.json"
TINY = Geometry("tiny DiT", lambda: models.dit_on_meta(2, 2, 8, 8), geometries()["dit-xl-256"].calls)
SETTINGS = Settings(STEPS, 2, CPU, torch.float32, floor=True)


def tiny_flux() -> nn.Module:
    with torch.device("meta"):
        return FluxTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ).eval()


def task_of(geometry: Geometry) -> Task:
    case = case_of(geometry, 1, STEPS, CPU, torch.float32)
    return Task(case, "every(2)", schedules_of(case.model, STEPS)["every(2)"])


@pytest.fixture(scope="module")
def dit() -> Task:
    return task_of(TINY)


@pytest.fixture(scope="module")
def flux() -> Task:
    return task_of(
        Geometry("tiny Flux", tiny_flux, lambda m, n, steps: models.flux_calls(m, n, steps, side=4, text_tokens=5))
    )


def chosen(*names: str) -> dict[str, Provider]:
    return {name: PROVIDERS[name] for name in names}


def test_rows_table_and_plot(dit: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(CacheDit, "applies", lambda *_: "not installed")  # whatever is installed here
    names = ("eager", "reduce-overhead", "hooks", "first-block", "cache-dit-mask", "fused")
    rows = measure_task(dit, SETTINGS, chosen(*names))
    assert tuple(rows) == names
    reasons = {name: row.reason for name, row in rows.items() if row.reason is not None}
    assert reasons == {
        "reduce-overhead": "its CUDA graphs need CUDA",
        "first-block": "DiTTransformer2DModel has no enable_cache (diffusers' CacheMixin)",
        "cache-dit-mask": "not installed",
    }
    for name in ("eager", "hooks", "fused"):
        row = rows[name]
        times, speedups = row.times, row.speedups
        positive = (times.run, times.run_p20, times.run_p80, times.full_step, speedups.vs_eager, speedups.realised)
        assert all(figure is not None and math.isfinite(figure) and figure > 0 for figure in positive)
        assert (times.repeats, row.state.gpu, row.state.spoiled) == (2, "not a GPU", False)
        assert times.host_step is row.own_process.allocated is row.own_process.compile_cold is None
    eager, hooks, fused = (rows[name].work for name in ("eager", "hooks", "fused"))
    assert (eager.difference, eager.theory, eager.computes) == (0.0, 1.0, "1" * STEPS)
    assert hooks.gate == "bits equal"
    assert fused.gate in ("bits equal", "within tolerance")
    assert hooks.theory == pytest.approx(fused.theory, rel=1e-12)  # nothing else feeds these sites
    assert hooks.difference == pytest.approx(fused.difference, rel=1e-3)
    assert fused.difference is not None
    assert fused.difference > 1e-6
    assert fused.computes == "10" * (STEPS // 2)
    floors = rows["fused"].floors
    assert floors.floor_full is not None
    assert floors.floor_partial is not None
    assert floors.floor_full > floors.floor_partial > 0

    text = show.table(list(rows.values()))
    assert "not measured on a GPU" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + len(names)
    results.save(rows.values(), tmp_path / "latency.json")
    kept = json.loads((tmp_path / "latency.json").read_text())
    assert [row["provider"] for row in kept["rows"]] == [PROVIDERS[name].name for name in names]
    assert kept["rows"][2]["vs_eager"] == pytest.approx(rows["hooks"].speedups.vs_eager, rel=1e-5)
    assert results.read(tmp_path / "latency.json")[2].work.computes == hooks.computes
    show.draw(list(rows.values()), tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 1000


def test_published_rows_are_read_and_written_the_same() -> None:
    published = [{k: v for k, v in row.items() if k != "machine"} for row in benchmark_rows.read(PUBLISHED)]
    again = [benchmark_rows.short(results.flat(row)) for row in results.read(PUBLISHED)]
    assert [json.dumps(row) for row in again] == [json.dumps(row) for row in published]
    with pytest.raises(TypeError, match="unheard_of"):
        results.row_of({**published[0], "unheard_of": 1})


def test_rows_of_other_cases_stay_and_name_their_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(case: str, run: float) -> results.LatencyRow:
        measured = results.Measured(case, "every(2)", STEPS, "eager", "uncached", "cpu", "float32")
        return results.LatencyRow(measured, times=results.Times(run=run))

    path = tmp_path / "latency.json"
    monkeypatch.setattr(results.rows, "machine", lambda: {"device": "old"})
    results.save([row("a", 1.0), row("b", 1.0)], path)
    monkeypatch.setattr(results.rows, "machine", lambda: {"device": "new"})
    results.save([row("b", 2.0), row("c", 2.0)], path)
    assert [(found.measured.case, found.times.run) for found in results.read(path)] == [
        ("a", 1.0),
        ("b", 2.0),
        ("c", 2.0),
    ]
    kept = json.loads(path.read_text())
    assert [kept["machines"][found["machine"]]["device"] for found in kept["rows"]] == ["old", "new", "new"]
    results.save([row("a", 3.0)], path)
    assert json.loads(path.read_text())["machines"] == [{"device": "new"}]  # nothing is left of the old one


@dataclasses.dataclass(frozen=True)
class Broken:
    """A peer that fails as only the code of others can."""

    name: str = "broken"
    role: Role = "peer"

    def applies(self, task: Task) -> str | None:
        return None

    def prepare(self, task: Task) -> Runner:
        raise AssertionError("not here")


def test_a_peer_that_fails_has_its_reason_and_the_others_go_on(dit: Task) -> None:
    settings = dataclasses.replace(SETTINGS, repeats=1, floor=False)
    rows = measure_task(dit, settings, {"broken": Broken(), **chosen("eager")})
    assert rows["broken"].reason == "AssertionError: not here"
    assert rows["eager"].times.run is not None


def test_a_chosen_mask_is_not_chosen_again(flux: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first-block", "taylorseer", "pab"):
        first = PROVIDERS[name].prepare(flux)
        first.close()
        with monkeypatch.context() as patch:
            patch.setattr(Task, "plan", None)  # neither captured nor counted
            again = PROVIDERS[name].prepare(dataclasses.replace(flux, peer_mask=first.computes))
            assert again.computes == first.computes
            again.close()


@dataclasses.dataclass(frozen=True)
class Spoiled:
    """hooks or fused, but off by a part in a thousand from the given run on."""

    inner: Provider
    from_run: int

    @property
    def name(self) -> str:
        return "spoiled"

    @property
    def role(self) -> Role:
        return self.inner.role

    def applies(self, task: Task) -> str | None:
        return None

    def prepare(self, task: Task) -> Runner:
        runner = self.inner.prepare(task)
        reset, step = runner.reset, runner.step
        runs = 0

        def counted() -> None:
            nonlocal runs
            runs += 1
            reset()

        def spoiled(index: int) -> Any:
            output = step(index)
            factor = 1.001 if runs >= self.from_run and index == 2 else 1.0
            return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor * factor, output)

        runner.reset, runner.step = counted, spoiled  # type: ignore[method-assign]
        return runner


@pytest.mark.parametrize(("name", "from_run"), [("hooks", 1), ("fused", WARM_UPS + 2)], ids=["at once", "once warm"])
def test_a_spoiled_output_has_no_figures(dit: Task, name: str, from_run: int) -> None:
    settings = dataclasses.replace(SETTINGS, repeats=1, floor=False)
    rows = measure_task(dit, settings, {**chosen("eager"), "spoiled": Spoiled(PROVIDERS[name], from_run)})
    assert rows["spoiled"].reason is not None
    assert rows["spoiled"].reason.startswith("GateError: step 2: off by")
    assert rows["spoiled"].times.run is rows["spoiled"].work.gate is rows["spoiled"].work.theory is None
    assert rows["eager"].times.run is not None


def test_an_output_that_is_not_finite_stops_a_peer_too() -> None:
    with pytest.raises(gate.GateError, match="step 1: the output is not finite"):
        gate.gate("peer", gate.Truth([], []), [torch.ones(2), torch.tensor([1.0, math.nan])], CPU)


def state_of(model: nn.Module) -> dict[str, set[str]]:
    left = {"_diffusers_hook", "_cache_config", "forward"}  # diffusers leaves an empty registry, and the bound forward
    return {name: set(module.__dict__) - left for name, module in model.named_modules()}


@pytest.fixture
def on_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "tree", lambda case: case.model)


@pytest.mark.usefixtures("on_the_model_itself")
@pytest.mark.parametrize(
    "name",
    [
        *("eager", "hooks", "fused", "first-block", "taylorseer", "pab"),
        pytest.param("plain", marks=pytest.mark.exhaustive),
    ],
)
def test_adapters_leave_the_model_as_it_was(flux: Task, name: str) -> None:
    calls = flux.case.calls
    with torch.no_grad():
        before = [gate.first_tensor(flux.case.model(**call)) for call in calls]
    state = state_of(flux.case.model)
    runner = PROVIDERS[name].prepare(flux)
    changed = gate.relative_rms(gate.outputs_of(runner), before)
    runner.close()
    assert (changed == 0.0) == (name == "eager")  # it did run another way
    assert state_of(flux.case.model) == state
    with torch.no_grad():
        for call, expected in zip(calls, before, strict=True):
            assert torch.equal(gate.first_tensor(flux.case.model(**call)), expected)


def test_trees_share_weights_and_nothing_else(dit: Task) -> None:
    tree, raised = dit.case.tree(), dit.case.tree(torch.float64)
    for own, shared, copied in zip(dit.case.model.parameters(), tree.parameters(), raised.parameters(), strict=True):
        assert shared is own
        assert (own.dtype, copied.dtype) == (torch.float32, torch.float64)
        assert torch.equal(copied.float(), own)
    assert not set(map(id, tree.modules())) & set(map(id, dit.case.model.modules()))


@pytest.mark.parametrize("name", ["first-block", "taylorseer", "pab"])
def test_peers_do_at_least_our_work(flux: Task, name: str) -> None:
    runner = PROVIDERS[name].prepare(flux)
    assert 1.0 < runner.theory() <= flux.theory * (1 + 1e-9)
    fewer = sum(runner.computes) - 1
    full = flux.plan.full_flops
    if fewer:  # with a step less they would do less than ours
        runner.reset()
        by_step = [runner.step_flops(step) for step in range(STEPS)]
        partial = [flops for flops, computed in zip(by_step, runner.computes, strict=True) if not computed]
        assert [flops for flops, computed in zip(by_step, runner.computes, strict=True) if computed] == [full] * (
            fewer + 1
        )
        assert STEPS * full > flux.theory * (fewer * full + (STEPS - fewer) * partial[0])
    runner.close()


@pytest.mark.parametrize(("full", "partial"), [(100, 0), (100, 7), (100, 60), (1, 1)])
@pytest.mark.parametrize("limit", [1.0, 1.3, 1.96, 2.0, 5.0])
def test_masks_come_as_near_as_they_can(full: int, partial: int, limit: float) -> None:
    def theory(computed: int) -> float:
        return 20 * full / (computed * full + (20 - computed) * partial)

    computed = fewest_computed(full, partial, 20, limit)
    assert theory(computed) <= limit * (1 + 1e-8)
    assert computed == 1 or theory(computed - 1) > limit
    mask = evenly(computed, 20)
    chosen_steps = [step for step, computes in enumerate(mask) if computes]
    gaps = [later - step for step, later in itertools.pairwise([*chosen_steps, 20])]
    assert (mask[0], sum(mask)) == (True, computed)
    assert max(gaps) - min(gaps) <= 1


class FakeNvml:
    """As much of pynvml as a Sensor asks for; throttled by its power cap at every fourth look."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonSwThermalSlowdown = 32
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128

    def __init__(self, *, counts_energy: bool = True, throttles: bool = True) -> None:
        self.looks = 0
        self.counts_energy, self.throttles = counts_energy, throttles

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self.looks += 1
        return 1 | (4 if self.throttles and self.looks % 4 == 0 else 0)  # 1: idle, which is no throttling

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.counts_energy:
            raise self.NVMLError("not supported")
        return 5000 * self.looks

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1980 - self.looks, 2: 2619}[kind]

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 40 + self.looks


def uncached_row_on_a_gpu() -> results.LatencyRow:
    measured = results.Measured("case", "every(2)", STEPS, "eager", "uncached", "some GPU", "float32")
    return results.LatencyRow(measured, work=results.Work(theory=1.0))


def test_throttled_runs_spoil_a_row(dit: Task) -> None:
    runner = PROVIDERS["eager"].prepare(dit)
    blank = uncached_row_on_a_gpu()
    clock = measure.CpuClock()

    def row(fake: FakeNvml) -> results.LatencyRow:
        samples = measure.interleave({"eager": runner}, 2, clock, nvml.Sensor(fake, "handle"))
        return figures.with_figures(blank, runner.computes, 1, samples, "eager", [], "")

    spoiled = row(FakeNvml())
    assert spoiled.state.spoiled
    assert spoiled.state.joules_image == pytest.approx(5.0)
    assert spoiled.state.gpu == {
        "sm_mhz_min": 1976,
        "memory_mhz_min": 2619,
        "celsius_max": 44,
        "throttled": ["power cap"],
        "throttled_runs": 1,
    }
    assert "eager **(spoiled: throttled)**" in show.table([spoiled])
    clean = row(FakeNvml(counts_energy=False, throttles=False))
    assert not clean.state.spoiled
    assert clean.state.joules_image is None
    assert clean.times.host_step is not None


class MuteNvml(FakeNvml):
    """Answers nothing: in a slice of a GPU, or without permission."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvmlDeviceGet"):
            return self.refuse
        return super().__getattribute__(name)

    def refuse(self, *arguments: Any) -> int:
        raise self.NVMLError("not supported")


def test_what_nvml_does_not_tell_is_left_out(dit: Task) -> None:
    runner = PROVIDERS["eager"].prepare(dit)
    samples = measure.interleave({"eager": runner}, 1, measure.CpuClock(), nvml.Sensor(MuteNvml(), "handle"))
    blank = uncached_row_on_a_gpu()
    row = figures.with_figures(blank, runner.computes, 1, samples, "eager", [], "")
    assert isinstance(row.state.gpu, dict)
    assert set(row.state.gpu.values()) == {None}
    assert (row.state.spoiled, row.state.joules_image) == (False, None)


def test_one_provider_is_alive_at_a_time(dit: Task) -> None:
    alive: set[str] = set()
    most = 0

    @dataclasses.dataclass(frozen=True)
    class Counted:
        name: str
        role: Role = "peer"

        def applies(self, task: Task) -> str | None:
            return None

        def prepare(self, task: Task) -> Runner:
            nonlocal most
            alive.add(self.name)
            most = max(most, len(alive))
            runner = PROVIDERS["hooks"].prepare(task)
            close = runner.close

            def closed() -> None:
                alive.remove(self.name)
                close()

            runner.close = closed  # type: ignore[method-assign]
            return runner

    providers = {**chosen("eager"), **{name: Counted(name) for name in ("one", "two", "three")}}
    rows = measure_task(dit, dataclasses.replace(SETTINGS, repeats=1, floor=False), providers)
    assert (most, alive) == (1, set())
    assert all(row.speedups.vs_eager is not None for row in rows.values())


def test_the_gate_takes_one_copy_of_the_weights(dit: Task) -> None:
    before = [(parameter.dtype, parameter.clone()) for parameter in dit.case.model.parameters()]
    with dit.case.in_precision(torch.float64):
        assert {parameter.dtype for parameter in dit.case.tree().parameters()} == {torch.float64}
    for parameter, (dtype, value) in zip(dit.case.model.parameters(), before, strict=True):
        assert parameter.dtype == dtype
        assert torch.equal(parameter, value)


class FakeCuda:
    """A stream whose time goes on by a second with each moment recorded."""

    def __init__(self) -> None:
        self.recorded = self.waited = 0

    def Event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace()

        def record(stream: str) -> None:
            assert stream == "the current one"
            self.recorded += 1
            event.at = self.recorded

        event.record = record
        event.elapsed_time = lambda other: 1000.0 * (other.at - event.at)
        return event

    def current_stream(self, device: torch.device | None) -> str:
        return "the current one"

    def synchronize(self, device: torch.device | None) -> None:
        self.waited += 1


def test_steps_on_a_gpu_are_timed_between_events_without_waiting(dit: Task) -> None:
    cuda = FakeCuda()
    runners = {"eager": PROVIDERS["eager"].prepare(dit)}
    samples = measure.interleave(runners, 1, measure.CudaClock(cuda=cuda))["eager"]
    assert samples.steps == [[1.0] * STEPS]
    assert cuda.waited == 4  # before and after the whole run, before and after the steps
    computes = (True, True, False, False)
    assert samples.step_median(computes) == 1.0
    assert samples.step_median((True, *[False] * (STEPS - 1))) is None  # the first step is left out


@pytest.fixture
def meta() -> Iterator[torch.device]:
    with torch.device("meta") as device:
        yield device


@pytest.mark.parametrize(
    ("name", "millions", "tokens"),
    [
        ("dit-xl-256", 750, (2, 8, 32, 32)),
        pytest.param("dit-xl-512", 750, (2, 8, 64, 64), marks=pytest.mark.exhaustive),
        ("pixart-256", 610, (2, 8, 32, 32)),
        pytest.param("pixart-512", 610, (2, 8, 64, 64), marks=pytest.mark.exhaustive),
        ("pixart-1024", 612, (2, 8, 128, 128)),
        ("pixart-sigma-2048", 611, (2, 8, 256, 256)),
        pytest.param("flux-1024", 11901, (1, 4096, 64), marks=pytest.mark.exhaustive),
    ],
)
def test_full_sizes_on_the_meta_device(meta: torch.device, name: str, millions: int, tokens: tuple[int, ...]) -> None:
    geometry = geometries()[name]
    model = geometry.build()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)
    with torch.device("cpu"):
        call = geometry.calls(model, 1, 2)[0]
    call = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(meta), call)
    with torch.no_grad():
        assert gate.first_tensor(model(**call)).shape == tokens


def test_released_and_learned_schedules_go_with_their_models() -> None:
    xl = models.dit_on_meta(28, 2, 8, 8)
    assert set(schedules_of(xl, 20)) == {"every(2)", "released"}
    assert set(schedules_of(xl, 10)) == {"every(2)"}
    assert set(schedules_of(geometries()["bundled"].build(), 20)) == {"every(2)", "learned"}


def test_floor_counts_the_products_that_are_left(dit: Task) -> None:
    full, idle = (program.step for program in lower(HOISTED, dit.plan, roles(dit.case.call())).programs)
    # a block: query, key, value, attention, output, and two of the feed-forward; patches in, patches out
    assert len(floor.products(full.graph)) == 2 * 7 + 2
    assert len(floor.products(idle.graph)) == 2
    latents, results_, site = 2 * 4 * 8 * 8, 2 * 8 * 8 * 8, 2 * 16 * 16
    assert floor.other_bytes(idle) == 4 * (latents + results_ + 4 * site)
    assert floor.other_bytes(full) == 4 * (latents + results_)


def test_alone_says_what_it_found_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "geometries", lambda flux_blocks: {"tiny": TINY})
    spec = alone.Spec("tiny", 1, 2, "every(2)", "eager", "cpu", "float32", (1, 1), (True, True))
    monkeypatch.setattr(sys, "argv", ["alone", json.dumps(dataclasses.asdict(spec))])
    alone.main()
    found = alone.Alone(**json.loads(capsys.readouterr().out))
    assert math.isfinite(found.compile_seconds)
    assert found.allocated is found.reserved is None


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="long trace\nOutOfMemoryError: too much\n")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"(?s)fused failed in its own process: .*OutOfMemoryError: too much"):
        alone.measure_apart(alone.Spec("tiny", 1, 2, "every(2)", "fused", "cpu", "float32", (1, 1), (True, False)))
