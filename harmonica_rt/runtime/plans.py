"""The plans of one model by the signature of their calls, bounded in number and in bytes."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

import torch

from harmonica_rt.capture.call import Signature
from harmonica_rt.capture.roles import Role
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan
from harmonica_rt.runtime.engine import RunKey
from harmonica_rt.runtime.execution import PlanRuntime, Weights
from harmonica_rt.runtime.graphs import Graphs
from harmonica_rt.runtime.launches import has_streams

log = logging.getLogger(__name__)

SHARE = 0.25  # of a GPU's memory that the plans of a model may hold, unless told otherwise


class Plans:
    """A bounded cache of lowered plans.

    Args:
        model_name: for the log.
        lowering: one of `harmonica_rt.lower.LOWERINGS`.
        graphs: how step programs become graphs; None runs them launch by launch.
        debug: fill slots with NaN before they are written and after their last read.
        limit: plans kept; the one unused longest goes first.
        max_bytes: bytes that all plans may hold, see `check_limits`.
    """

    def __init__(
        self,
        model_name: str,
        *,
        lowering: str,
        graphs: Graphs | None,
        debug: bool,
        limit: int,
        max_bytes: int | None = None,
    ) -> None:
        self.lowering = lowering
        self._model_name = model_name
        self._graphs = graphs
        self._debug = debug
        self._limit = limit
        self._max_bytes = max_bytes
        self._held: OrderedDict[Signature, PlanRuntime] = OrderedDict()
        self._key: RunKey | None = None

    def __contains__(self, signature: Signature) -> bool:
        return signature in self._held

    def __getitem__(self, signature: Signature) -> PlanRuntime:
        """The plan, now the one used last."""
        self._held.move_to_end(signature)
        return self._held[signature]

    @property
    def held(self) -> dict[Signature, PlanRuntime]:
        """All plans, the one used last at the end."""
        return dict(self._held)

    @property
    def pool_bytes(self) -> int | None:
        """Bytes that graphs reserved between their inputs and outputs; None where there are no graphs."""
        pools = [runtime.pool for runtime in self._held.values() if runtime.pool is not None]
        return sum(pool.nbytes for pool in pools) if pools else None

    @property
    def nbytes(self) -> int:
        """Bytes that all plans hold now."""
        return sum(runtime.nbytes for runtime in self._held.values())

    def begin_run(self, key: RunKey | None) -> None:
        """A run begins, for every plan."""
        self._key = key
        for runtime in self._held.values():
            runtime.begin_run(key)
        self._drop_surplus(coming=0)

    def clear(self) -> None:
        """Drop all plans."""
        self._held.clear()

    def add(
        self, signature: Signature, plan: Plan, weights: Weights, roles: tuple[Role, ...], *, started: float
    ) -> PlanRuntime:
        """Check, lower and keep a plan, and drop those unused longest where there are too many or they hold too much.

        Args:
            signature: of its calls.
            plan: the plan.
            weights: see `PlanRuntime`.
            roles: of the leaves of its calls.
            started: when its making began, by `time.perf_counter()`.

        Raises:
            InvariantError: the plan breaks a rule.
        """
        check_plan(plan)
        with signature.in_its_autocast():
            runtime = PlanRuntime(
                plan,
                weights,
                roles,
                lowering=self.lowering,
                debug=self._debug,
                pool=self._graphs.make_pool(signature.device) if self._graphs is not None else None,
                measured=self._graphs is not None and self._graphs.measured,
            )
        runtime.begin_run(self._key)
        runtime.compile_seconds = time.perf_counter() - started
        self._held[signature] = runtime
        log.info(
            "planned %s for %s in %.1f s: %d step programs",
            self._model_name,
            signature,
            runtime.compile_seconds,
            len(plan.programs),
        )
        self._drop_surplus(coming=sum(plan.table.arena_bytes.values()))
        return runtime

    def _drop_surplus(self, *, coming: int) -> None:
        """Drop plans, the one unused longest first, until both limits hold.

        The plan used last stays, and so does every plan of the run at hand: its streams hold it, so dropping it would
        give nothing back, and the next run would make it again.

        Args:
            coming: bytes that the plan used last is about to take.
        """
        for signature, runtime in [*self._held.items()][:-1]:
            too_many, too_large = len(self._held) > self._limit, self._too_large(coming) and runtime.nbytes > 0
            if runtime.in_use or not (too_many or too_large):
                continue
            del self._held[signature]
            reason = f"{self._limit} plans are kept" if too_many else f"plans may hold {self._byte_limit()} bytes"
            log.info("dropped the plan for %s: %s", signature, reason)

    def _too_large(self, coming: int) -> bool:
        limit = self._byte_limit()
        return limit is not None and self.nbytes + coming > limit

    def _byte_limit(self) -> int | None:
        """What was asked for, or a share of the device's memory; None for no limit."""
        if self._max_bytes is not None or not self._held:
            return self._max_bytes
        device = next(reversed(self._held)).device
        return int(SHARE * torch.cuda.get_device_properties(device).total_memory) if has_streams(device) else None


def check_limits(max_plans: int, max_plan_bytes: int | None) -> None:
    """Check what a user may set.

    Args:
        max_plans: plans kept at once.
        max_plan_bytes: bytes of device memory that all plans may hold: arenas, the inputs of graphs, and what graphs
            reserved. None for a quarter of a GPU's memory, and for no limit on a CPU. The plan in use is kept however
            large it is.

    Raises:
        HarmonicaError: one is below 1.
    """
    if max_plans < 1:
        raise HarmonicaError(f"max_plans is {max_plans}; at least 1 plan must be kept")
    if max_plan_bytes is not None and max_plan_bytes < 1:
        raise HarmonicaError(
            f"max_plan_bytes is {max_plan_bytes}; give a number of bytes, or None for a quarter of a GPU's memory"
        )
