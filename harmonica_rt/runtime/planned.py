"""The compiled engine: plans in a bounded cache, one a signature, and streams that run them."""

from __future__ import annotations

import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmonica_rt.capture.call import Call, Signature
from harmonica_rt.capture.graph import capture
from harmonica_rt.capture.reasons import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.capture.roles import Role, roles
from harmonica_rt.capture.snapshot import ModelSnapshot, named_tensors
from harmonica_rt.indices import ProgramId, SlotId, StepIndex
from harmonica_rt.lower import Lowering, lower
from harmonica_rt.lower.plain import Program
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan, build_plan
from harmonica_rt.runtime.engine import Stream
from harmonica_rt.runtime.prologue import LoweredPart, LoweredPrologue, StreamPrologue
from harmonica_rt.runtime.reference import ReferenceEngine
from harmonica_rt.schedule import Schedule

log = logging.getLogger(__name__)


class FallbackWarning(UserWarning):
    """A model could not be captured and runs eagerly with the same schedule: same images, less speed."""


class PlannedEngine:
    """Captures and plans at the first call of each signature; runs the reference where that is not possible.

    Args:
        model: the denoiser, in eval mode.
        schedule: what to reuse when.
        lowering: how step programs are made, one of `harmonica_rt.lower.LOWERINGS`.
        strict: raise CaptureError instead of falling back.
        max_plans: plans kept; the one unused longest goes first.
        debug: fill slots with NaN before they are written and after their last read.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        lowering: str,
        strict: bool,
        max_plans: int,
        debug: bool,
    ) -> None:
        self._model = model
        self._schedule = schedule
        self.lowering = lowering
        self._strict = strict
        self._max_plans = max_plans
        self._debug = debug
        self._plans: OrderedDict[Signature, PlanRuntime] = OrderedDict()
        self._snapshot: ModelSnapshot | None = None
        self._reference = ReferenceEngine(model, schedule)
        self.failures: dict[Signature, CaptureFailure] = {}

    @property
    def plans(self) -> dict[Signature, PlanRuntime]:
        """The plans in the cache, the one used last at the end."""
        return dict(self._plans)

    def begin_run(self) -> None:
        """Drop plans that the model has outgrown; fetch its weights anew."""
        difference = self._snapshot.difference(self._model) if self._snapshot is not None else None
        if difference is not None:
            log.warning("%s was captured again: %s", type(self._model).__name__, difference)
            self._plans.clear()
            self.failures.clear()
            self._snapshot = None
        for runtime in self._plans.values():
            runtime.begin_run()

    def new_stream(self, call: Call) -> Stream:
        """A stream over the plan for the signature of `call`, captured now if there is none."""
        signature = call.signature
        if signature not in self._plans and signature not in self.failures:
            self._add_plan(call)
        if signature in self.failures:
            return self._reference.new_stream(call)
        self._plans.move_to_end(signature)
        return self._plans[signature].new_stream()

    def _add_plan(self, call: Call) -> None:
        started = time.perf_counter()
        if self._snapshot is None:
            self._snapshot = ModelSnapshot(self._model)
        name = type(self._model).__name__
        try:
            captured = capture(self._model, call, self._schedule.sites)
        except CaptureError as error:
            # What the user can mend at once is no reason to run slowly.
            if self._strict or error.failure.obstacle in (Obstacle.TRAINING, Obstacle.SITE):
                raise
            self.failures[call.signature] = error.failure
            message = f"{name} runs without a compiled plan, eagerly with the same schedule. {error.failure}"
            log.warning("%s", message)
            warnings.warn(message, FallbackWarning, stacklevel=2)
            return
        plan = build_plan(captured, self._schedule)
        check_plan(plan)
        runtime = PlanRuntime(plan, self._model, roles(call), lowering=self.lowering, debug=self._debug)
        runtime.compile_seconds = time.perf_counter() - started
        self._plans[call.signature] = runtime
        log.info(
            "planned %s for %s in %.1f s: %d step programs",
            name,
            call.signature,
            runtime.compile_seconds,
            len(plan.programs),
        )
        while len(self._plans) > self._max_plans:
            signature, _ = self._plans.popitem(last=False)
            log.info("dropped the plan for %s: %d plans are kept", signature, self._max_plans)


class PlanRuntime:
    """A plan, lowered, with the weights of the current run and the arenas of its streams."""

    def __init__(self, plan: Plan, model: nn.Module, leaf_roles: Sequence[Role], *, lowering: str, debug: bool) -> None:
        self.plan = plan
        self.debug = debug
        started = time.perf_counter()
        self.lowered: Lowering = lower(lowering, plan, leaf_roles)
        prologue = self.lowered.prologue
        self._prologue = (
            LoweredPrologue(prologue, plan.captured.root, len(plan.steps)) if prologue is not None else None
        )
        self.lower_seconds = time.perf_counter() - started
        self.compile_seconds = 0.0  # from the call to the plan, checks included; set by who made it
        self._catch_up: dict[StepIndex, tuple[Program, tuple[SlotId, ...]]] = {}
        self._model = model
        self._weights: dict[str, torch.Tensor] | None = None
        self._bound: dict[Program | LoweredPart, tuple[Any, ...]] = {}
        self._free: list[SlotBuffers] = []
        self._lent: list[SlotBuffers] = []

    @property
    def cache_bytes(self) -> int:
        """Bytes of all arenas held now: one set for each stream that ran at once."""
        return sum(buffers.nbytes for buffers in (*self._free, *self._lent))

    def begin_run(self) -> None:
        """Take back all arenas; fetch the weights anew at their first use."""
        self._free, self._lent = [*self._lent, *self._free], []
        self._weights = None
        self._bound.clear()

    def new_stream(self) -> PlanStream:
        """A stream with an arena of its own."""
        buffers = self._free.pop() if self._free else SlotBuffers(self.plan)
        self._lent.append(buffers)
        if self.debug:
            buffers.poison_all()
        prologue = StreamPrologue(self._prologue, self.bound) if self._prologue is not None else None
        return PlanStream(self, buffers, prologue)

    def program(self, index: ProgramId) -> Program:
        """A lowered step program."""
        return self.lowered.programs[index]

    def catch_up(self, step: StepIndex) -> tuple[Program, tuple[SlotId, ...]]:
        """The program that computes `step` in full, and the slots it fills."""
        if step not in self._catch_up:
            graph, slots = self.plan.catch_up_graph(step)
            self._catch_up[step] = self.lowered.program(graph), slots
        return self._catch_up[step]

    def bound(self, program: Program | LoweredPart) -> tuple[Any, ...]:
        """The weights and constants of `program`, as the model holds them in this run."""
        bound = self._bound.get(program)
        if bound is None:
            if self._weights is None:
                self._weights = named_tensors(self._model)
            bound = self._bound[program] = program.bind(self._weights, self.plan.captured.constants)
        return bound


class PlanStream:
    """A stream that runs step programs over one set of slots, and what was computed for them beforehand."""

    def __init__(self, runtime: PlanRuntime, buffers: SlotBuffers, prologue: StreamPrologue | None) -> None:
        self.runtime = runtime
        self.buffers = buffers
        self.prologue = prologue

    def begin(self) -> None:
        """See `Stream.begin`."""
        if self.prologue is not None:
            self.prologue.begin()

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """See `Stream.run`."""
        runtime = self.runtime
        entry = runtime.plan.steps[step]
        if catch_up:
            program, writes = runtime.catch_up(step)
            reads: tuple[SlotId, ...] = ()
        else:
            program, reads, writes = runtime.program(entry.program), entry.reads, entry.writes
        slots = self.buffers.slots
        hoisted = self.prologue.at(step, call) if self.prologue is not None else {}
        outputs = program(
            runtime.bound(program),
            call.leaves,
            [slots[slot] for slot in reads],
            [slots[slot] for slot in writes],
            [hoisted[name] for name in program.step.hoisted],
        )
        if runtime.debug:
            self.buffers.poison_dead(step)
        return pytree.tree_unflatten(outputs, runtime.plan.captured.out_spec)


class SlotBuffers:
    """The memory of one stream: an arena a device, and one tensor a slot that looks into it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        with torch.inference_mode(False), torch.no_grad():
            self._arenas = {
                device: torch.empty(size, dtype=torch.uint8, device=device)
                for device, size in plan.table.arena_bytes.items()
            }
            self.slots = [self._view(slot.value, slot.offset) for slot in plan.table.slots]

    @property
    def nbytes(self) -> int:
        """Bytes of the arenas."""
        return sum(arena.nbytes for arena in self._arenas.values())

    def poison_all(self) -> None:
        """Fill every slot with NaN (integers: their largest value)."""
        for slot in self.slots:
            _poison(slot)

    def poison_dead(self, step: StepIndex) -> None:
        """Fill the slots whose last read was in `step`."""
        for slot in self._plan.table.slots:
            if slot.value.last == step:
                _poison(self.slots[slot.id])

    def _view(self, value: Any, offset: int) -> torch.Tensor:
        arena = self._arenas[value.device]
        flat = arena[offset : offset + value.extent].view(value.dtype)
        return flat.as_strided(value.shape, value.stride)


def _poison(slot: torch.Tensor) -> None:
    with torch.inference_mode(False), torch.no_grad():
        core = slot
        for dim, (n, stride) in enumerate(zip(slot.shape, slot.stride(), strict=True)):
            if stride == 0 and n > 1:
                core = core.narrow(dim, 0, 1)
        if slot.dtype.is_floating_point or slot.dtype.is_complex:
            core.fill_(float("nan"))
        elif slot.dtype is torch.bool:
            core.fill_(True)
        else:
            core.fill_(torch.iinfo(slot.dtype).max)
