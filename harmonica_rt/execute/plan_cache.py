"""A cache of the plans of one model by the signature of their calls, bounded in number and in bytes."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from harmonica_rt.call.call import Signature
from harmonica_rt.call.roles import Role
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.engine import RunKey
from harmonica_rt.execute.cuda_graphs import Graphs
from harmonica_rt.execute.launch_order import has_streams
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.execute.op_kernels import compile_ahead
from harmonica_rt.execute.parameter_binding import Parameters
from harmonica_rt.execute.plan_runtime import PlanRuntime
from harmonica_rt.model.facts import Facts
from harmonica_rt.options import CompileOptions
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan
from harmonica_rt.schedule import Schedule

log = logging.getLogger(__name__)

SHARE = 0.25  # fraction of a GPU's memory that the plans of a model may hold by default


class PlanKey(NamedTuple):
    """What a plan is kept under.

    Attributes:
        signature: the signature of its calls.
        model: the facts of the model that it was made for; None where the caller ensures that they hold.
        schedule: the schedule that it implements; None in the key of what holds for all schedules.
    """

    signature: Signature
    model: Facts | None = None
    schedule: Schedule | None = None

    def __str__(self) -> str:
        return str(self.signature)

    def without_schedule(self) -> PlanKey:
        """The key of what holds for all schedules."""
        return self._replace(schedule=None)

    def without_request_values(self) -> PlanKey:
        """This key without request values, as a call has it before a plan is found."""
        return self._replace(signature=dataclasses.replace(self.signature, request_values=()))


class Plans:
    """A bounded cache of lowered plans.

    Args:
        model_name: name of the model in log messages.
        options: how plans are made and kept. Their bytes are arenas, inputs of graphs, and what graphs reserve; a plan
            in use is kept, however large it is.
        graphs: how step programs become CUDA graphs; None runs them launch by launch.
    """

    def __init__(
        self,
        model_name: str,
        options: CompileOptions,
        graphs: Graphs | None,
    ) -> None:
        self.options = options
        self._model_name = model_name
        self._graphs = graphs
        self._held: dict[PlanKey, PlanRuntime] = {}  # not an OrderedDict, which an interruption can corrupt
        self._key: RunKey | None = None

    def __contains__(self, key: PlanKey) -> bool:
        return key in self._held

    def __getitem__(self, key: PlanKey) -> PlanRuntime:
        """The plan, which becomes the most recently used one."""
        runtime = self._held[key] = self._held.pop(key)
        return runtime

    @property
    def held(self) -> dict[PlanKey, PlanRuntime]:
        """All plans, from the least to the most recently used."""
        return dict(self._held)

    @property
    def pool_bytes(self) -> int | None:
        """Bytes that the pools of all plans hold; None where no plan has a pool."""
        pools = [runtime.pool for runtime in self._held.values() if runtime.pool is not None]
        return sum(pool.nbytes for pool in pools) if pools else None

    @property
    def nbytes(self) -> int:
        """Bytes that all plans hold now."""
        return sum(runtime.nbytes for runtime in self._held.values())

    def captured_before(self, key: PlanKey, leaves: Sequence[Any]) -> CapturedGraph | None:
        """The captured graph of a plan for another schedule that holds for a call with these leaves.

        None if there is no such plan. The graph takes no time to capture again.

        Args:
            key: as the call has it before a plan is found.
            leaves: of the call.
        """
        for held, runtime in self._held.items():
            captured = runtime.lowered.plan.captured
            values = captured.request_values
            same = held.without_request_values().without_schedule() == key.without_schedule()
            if same and (values is None or values.hold(leaves)):
                return dataclasses.replace(captured, seconds=0.0)
        return None

    def begin_run(self, key: RunKey | None) -> None:
        """A run begins, for every plan."""
        self._key = key
        for runtime in self._held.values():
            runtime.begin_run(key)
        self._drop_surplus(coming=0)

    def add(
        self,
        key: PlanKey,
        plan: Plan,
        parameters: Parameters,
        roles: tuple[Role, ...],
        *,
        started: float,
        loaded: bool = False,
    ) -> PlanRuntime:
        """Check, lower and keep a plan; drop the least recently used ones if there are too many or they hold too much.

        Args:
            key: what it is kept under.
            plan: the plan.
            parameters: see `ParameterBinding`.
            roles: roles of the leaves of its calls.
            started: `time.perf_counter()` when work on the plan began.
            loaded: whether it comes from a file.

        Raises:
            InvariantError: the plan breaks a rule.
            KernelError: Triton cannot compile a kernel of the plan.
        """
        check_plan(plan)
        signature = key.signature
        with signature.in_its_autocast():
            lowered = LoweredPlan(plan, roles, self.options.lowering, like=self._like(plan))
            runtime = PlanRuntime(lowered, parameters, signature.device, graphs=self._graphs, debug=self.options.debug)
        runtime.kernel_seconds = compile_ahead(lowered, signature.device)
        runtime.begin_run(self._key)
        runtime.compile_seconds = time.perf_counter() - started
        self._held[key] = runtime
        log.info(
            "%s %s for %s and %d steps in %.1f s: %d step programs",
            "loaded the plan of" if loaded else "planned",
            self._model_name,
            signature,
            len(plan.steps),
            runtime.compile_seconds,
            len(plan.programs),
        )
        self._drop_surplus(coming=sum(plan.table.arena_bytes.values()))
        return runtime

    def _like(self, plan: Plan) -> LoweredPlan | None:
        """A lowered plan of the same captured graph, if there is one."""
        lowered = (runtime.lowered for runtime in self._held.values())
        return next((one for one in lowered if one.plan.captured.graph is plan.captured.graph), None)

    def _drop_surplus(self, *, coming: int) -> None:
        """Drop plans, the least recently used first, until both limits hold.

        The most recently used plan stays, and so does every plan of the current run: its streams hold it, so dropping
        it would free nothing, and the next run would make it again.

        Args:
            coming: bytes that the most recently used plan is about to take.
        """
        most = self.options.max_plans
        for key, runtime in [*self._held.items()][:-1]:
            too_many, too_large = len(self._held) > most, self._too_large(coming) and runtime.nbytes > 0
            if runtime.in_use or not (too_many or too_large):
                continue
            del self._held[key]
            reason = f"{most} plans are kept" if too_many else f"plans may hold {self._byte_limit()} bytes"
            log.info("dropped the plan for %s: %s", key, reason)

    def _too_large(self, coming: int) -> bool:
        limit = self._byte_limit()
        return limit is not None and self.nbytes + coming > limit

    def _byte_limit(self) -> int | None:
        """`max_plan_bytes`, or else a share of the GPU's memory; None for no limit."""
        if self.options.max_plan_bytes is not None or not self._held:
            return self.options.max_plan_bytes
        device = next(reversed(self._held)).signature.device
        return int(SHARE * torch.cuda.get_device_properties(device).total_memory) if has_streams(device) else None
