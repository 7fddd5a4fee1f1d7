"""The compiled engine: captures and plans at the first call of a signature, and keeps the plans in a bounded cache."""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from harmonica_rt.capture.call import Call, Signature
from harmonica_rt.capture.graph import capture
from harmonica_rt.capture.reasons import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.capture.roles import Role, roles
from harmonica_rt.capture.snapshot import ModelSnapshot, check_capturable, named_tensors
from harmonica_rt.plan import saved
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan, build_plan
from harmonica_rt.runtime.engine import RunKey, Stream
from harmonica_rt.runtime.execution import PlanRuntime
from harmonica_rt.runtime.graphs import Graphs, Pool
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
        graphs: how step programs become graphs; None runs them launch by launch.
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
        graphs: Graphs | None = None,
    ) -> None:
        self._model = model
        self._schedule = schedule
        self.lowering = lowering
        self._strict = strict
        self._max_plans = max_plans
        self._debug = debug
        self._graphs = graphs
        self._pools: dict[torch.device, Pool | None] = {}  # shared by all plans
        self._key: RunKey | None = None
        self._plans: OrderedDict[Signature, PlanRuntime] = OrderedDict()
        self._snapshot: ModelSnapshot | None = None
        self._reference = ReferenceEngine(model, schedule)
        self.failures: dict[Signature, CaptureFailure] = {}

    @property
    def plans(self) -> dict[Signature, PlanRuntime]:
        """The plans in the cache, the one used last at the end."""
        return dict(self._plans)

    @property
    def pool_bytes(self) -> int | None:
        """Bytes that graphs reserved between their inputs and outputs; None where there are no graphs."""
        pools = [pool for pool in self._pools.values() if pool is not None]
        return sum(pool.nbytes for pool in pools) if pools else None

    def begin_run(self, key: RunKey | None = None) -> None:
        """Drop plans that the model has outgrown; fetch its weights anew."""
        self._key = key
        difference = self._snapshot.difference(self._model) if self._snapshot is not None else None
        if difference is not None:
            log.warning("%s was captured again: %s", type(self._model).__name__, difference)
            self._plans.clear()
            self.failures.clear()
            self._snapshot = None
        for runtime in self._plans.values():
            runtime.begin_run(key)

    def new_stream(self, call: Call) -> Stream:
        """A stream over the plan for the signature of `call`, captured now if there is none."""
        signature = call.signature
        if signature not in self._plans and signature not in self.failures:
            self._add_plan(call)
        if signature in self.failures:
            return self._reference.new_stream(call)
        self._plans.move_to_end(signature)
        return self._plans[signature].new_stream()

    def saved(self) -> list[dict[str, Any]]:
        """All plans as plain JSON values.

        Raises:
            PlanFileError: one has no such form.
        """
        return [saved.encode(runtime.plan, signature, runtime.roles) for signature, runtime in self._plans.items()]

    def restore(self, records: Iterable[dict[str, Any]]) -> None:
        """Keep plans that `saved` gave, for a model that is as it was then.

        Raises:
            CaptureError: the model is in a state that no plan can stand for.
            PlanFileError, KeyError, TypeError, ValueError, AttributeError, InvariantError: not what `saved` gave.
        """
        check_capturable(self._model)
        self._snapshot = ModelSnapshot(self._model)
        for record in records:
            started = time.perf_counter()
            self._keep(*saved.decode(record, self._schedule), started)

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
        self._keep(build_plan(captured, self._schedule), call.signature, roles(call), started)

    def _keep(self, plan: Plan, signature: Signature, leaf_roles: tuple[Role, ...], started: float) -> None:
        check_plan(plan)
        weights = functools.partial(named_tensors, self._model)
        runtime = PlanRuntime(
            plan,
            weights,
            leaf_roles,
            lowering=self.lowering,
            debug=self._debug,
            pool=self._pool(signature),
            measured=self._graphs is not None and self._graphs.measured,
        )
        runtime.begin_run(self._key)
        runtime.compile_seconds = time.perf_counter() - started
        self._plans[signature] = runtime
        name = type(self._model).__name__
        log.info(
            "planned %s for %s in %.1f s: %d step programs",
            name,
            signature,
            runtime.compile_seconds,
            len(plan.programs),
        )
        while len(self._plans) > self._max_plans:
            dropped, _ = self._plans.popitem(last=False)
            log.info("dropped the plan for %s: %d plans are kept", dropped, self._max_plans)

    def _pool(self, signature: Signature) -> Pool | None:
        """The pool of the device that the call's first tensor lies on."""
        if self._graphs is None:
            return None
        device = signature.device
        if device not in self._pools:
            self._pools[device] = self._graphs.make_pool(device)
        return self._pools[device]
