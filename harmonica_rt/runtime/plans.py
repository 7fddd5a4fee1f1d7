"""The plans of one model by the signature of their calls, and the pools that their graphs share."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import OrderedDict
from typing import NamedTuple

import torch

from harmonica_rt.capture.call import Signature
from harmonica_rt.capture.facts import Facts
from harmonica_rt.capture.roles import Role
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan
from harmonica_rt.runtime.engine import RunKey
from harmonica_rt.runtime.execution import PlanRuntime, Weights
from harmonica_rt.runtime.graphs import Graphs, Pool

log = logging.getLogger(__name__)


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
    """

    def __init__(self, model_name: str, *, lowering: str, graphs: Graphs | None, debug: bool, limit: int) -> None:
        self.lowering = lowering
        self._model_name = model_name
        self._graphs = graphs
        self._debug = debug
        self._limit = limit
        self._held: OrderedDict[PlanKey, PlanRuntime] = OrderedDict()
        self._pools: dict[torch.device, Pool | None] = {}
        self._key: RunKey | None = None

    def __contains__(self, key: PlanKey) -> bool:
        return key in self._held

    def __getitem__(self, key: PlanKey) -> PlanRuntime:
        """The plan, now the one used last."""
        self._held.move_to_end(key)
        return self._held[key]

    @property
    def held(self) -> dict[PlanKey, PlanRuntime]:
        """All plans, the one used last at the end."""
        return dict(self._held)

    @property
    def pool_bytes(self) -> int | None:
        """Bytes that graphs reserved between their inputs and outputs; None where there are no graphs."""
        pools = [pool for pool in self._pools.values() if pool is not None]
        return sum(pool.nbytes for pool in pools) if pools else None

    def begin_run(self, key: RunKey | None) -> None:
        """A run begins, for every plan."""
        self._key = key
        for runtime in self._held.values():
            runtime.begin_run(key)

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
        """Check, lower and keep a plan, and drop the one unused longest where there are too many.

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
                pool=self._pool(signature.device),
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
        while len(self._held) > self._limit:
            dropped, _ = self._held.popitem(last=False)
            log.info("dropped the plan for %s: %d plans are kept", dropped, self._limit)
        return runtime

    def _pool(self, device: torch.device) -> Pool | None:
        if self._graphs is None:
            return None
        if device not in self._pools:
            self._pools[device] = self._graphs.make_pool(device)
        return self._pools[device]
