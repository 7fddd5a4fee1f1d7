"""The plans of one model by the signature of their calls, bounded in number and in bytes."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import NamedTuple

import torch

from harmonica_rt.capture.call import Signature
from harmonica_rt.capture.facts import Facts
from harmonica_rt.capture.roles import Role
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan
from harmonica_rt.runtime.engine import RunKey
from harmonica_rt.runtime.execution import PlanRuntime, Weights
from harmonica_rt.runtime.graphs import Graphs
from harmonica_rt.runtime.launches import has_streams

log = logging.getLogger(__name__)

SHARE = 0.25  # of a GPU's memory that the plans of a model may hold, unless told otherwise


class PlanKey(NamedTuple):
    """What a plan is kept under.

    Attributes:
        signature: of its calls.
        model: the facts of the model that it was made for; None where those who make the calls see to that.
    """

    signature: Signature
    model: Facts | None = None

    def __str__(self) -> str:
        return str(self.signature)

    def without_reads(self) -> PlanKey:
        """The key that calls of this plan have, whatever the model reads of their request."""
        return self._replace(signature=dataclasses.replace(self.signature, read=()))


class Plans:
    """A bounded cache of lowered plans.

    Args:
        model_name: for the log.
        lowering: one of `harmonica_rt.lower.LOWERINGS`.
        graphs: how step programs become graphs; None runs them launch by launch.
        debug: fill slots with NaN before they are written and after their last read.
        limit: plans kept; the one unused longest goes first.
        max_bytes: bytes of device memory that all plans may hold: arenas, inputs of graphs, what graphs reserve.
            None for a quarter of a GPU's memory, and for no limit on a CPU. A plan in use is kept however large it is.
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
        self._held: dict[PlanKey, PlanRuntime] = {}  # no OrderedDict: an interrupted one is no longer whole
        self._key: RunKey | None = None

    def __contains__(self, key: PlanKey) -> bool:
        return key in self._held

    def __getitem__(self, key: PlanKey) -> PlanRuntime:
        """The plan, now the one used last."""
        runtime = self._held[key] = self._held.pop(key)
        return runtime

    @property
    def held(self) -> dict[PlanKey, PlanRuntime]:
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

    def add(
        self,
        key: PlanKey,
        plan: Plan,
        weights: Weights,
        roles: tuple[Role, ...],
        *,
        started: float,
        loaded: bool = False,
    ) -> PlanRuntime:
        """Check, lower and keep a plan, and drop those unused longest where there are too many or they hold too much.

        Args:
            key: what it is kept under.
            plan: the plan.
            weights: see `PlanRuntime`.
            roles: of the leaves of its calls.
            started: when its making began, by `time.perf_counter()`.
            loaded: whether it comes from a file.

        Raises:
            InvariantError: the plan breaks a rule.
        """
        check_plan(plan)
        signature = key.signature
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
        self._held[key] = runtime
        log.info(
            "%s %s for %s in %.1f s: %d step programs",
            "loaded the plan of" if loaded else "planned",
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
        for key, runtime in [*self._held.items()][:-1]:
            too_many, too_large = len(self._held) > self._limit, self._too_large(coming) and runtime.nbytes > 0
            if runtime.in_use or not (too_many or too_large):
                continue
            del self._held[key]
            reason = f"{self._limit} plans are kept" if too_many else f"plans may hold {self._byte_limit()} bytes"
            log.info("dropped the plan for %s: %s", key, reason)

    def _too_large(self, coming: int) -> bool:
        limit = self._byte_limit()
        return limit is not None and self.nbytes + coming > limit

    def _byte_limit(self) -> int | None:
        """What was asked for, or a share of the device's memory; None for no limit."""
        if self._max_bytes is not None or not self._held:
            return self._max_bytes
        device = next(reversed(self._held)).signature.device
        return int(SHARE * torch.cuda.get_device_properties(device).total_memory) if has_streams(device) else None
