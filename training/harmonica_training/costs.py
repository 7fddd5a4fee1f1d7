"""The cost of each site of a model and the theoretical speed-up of a mask, from the data flow of one forward.

Hazard: reusing a site saves more than the work inside its module. Work that fed only reused sites is saved too: in Flux
single blocks the attention and MLP before `proj_out`, in SD3 a context feed-forward once every attention after it is
reused. Work that is needed elsewhere remains, such as the modulation that gates a reused output. So site costs are not
additive, and no sum over modules gives them. Instead one forward is recorded operator by operator with its data flow,
and the cost of a pattern is the work that its outputs still need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from harmonica_rt.errors import ScheduleError, ScheduleMismatchError, SiteError
from harmonica_rt.schedule.sites import check_sites


class SiteCosts:
    """Costs of one forward. A multiply-add counts as two FLOPs, element-wise operators as zero.

    Attributes:
        sites: site paths, in the order of a mask's columns.
        total: FLOPs that the outputs of one uncached forward need.
        alone: `[sites]`, share of `total` that is saved when only this site is reused, in [0, 1].
    """

    def __init__(self, sites: Sequence[str], recording: _Recording) -> None:
        self.sites = tuple(sites)
        self._site_of = tuple(recording.cuts.values())
        self._regions = _regions(recording)
        counted = sorted({node for region in self._regions for node in region.work})
        self._flops = np.array([recording.flops[node] for node in counted], np.int64)
        self._work = np.array([np.isin(counted, list(region.work)) for region in self._regions], bool)
        self._known: dict[tuple[bytes, frozenset[int]], tuple[int, frozenset[int]]] = {}
        self.total = self.left(np.ones(len(self.sites), bool))
        only = [self.left(row) for row in ~np.eye(len(self.sites), dtype=bool)]
        self.alone: NDArray[np.float64] = 1.0 - np.array(only) / self.total if self.total else np.zeros(len(only))

    def left(self, row: ArrayLike) -> int:
        """FLOPs of a forward that computes the sites where `row`, `bool[sites]`, is True.

        The forward is taken by itself: a computed site that feeds only reused sites costs nothing here, whereas
        `speedup` counts it if a later step reads its output.

        Raises:
            TypeError: `row` is not boolean.
            ScheduleMismatchError: `row` has a different number of sites.
        """
        return self._forward(self._checked(row, 1), frozenset())[0]

    def speedup(self, mask: ArrayLike) -> float:
        """FLOPs of an uncached run / FLOPs of a run with this `bool[steps, sites]`, at least 1.

        Raises:
            TypeError: `mask` is not boolean.
            ScheduleMismatchError: `mask` has another shape.
            ScheduleError: the first step reuses a site.
        """
        compute = self._checked(mask, 2)
        if not len(compute) or not compute[0].all():
            raise ScheduleError("the first step has nothing to reuse: a mask needs a first row that is all True")
        left = 0
        # Backwards, because the outputs that a step must provide depend on what later steps read.
        wanted: frozenset[int] = frozenset()
        for row in compute[::-1]:
            computed = frozenset(cut for cut in wanted if row[self._site_of[cut]])
            flops, reads = self._forward(row, computed)
            left += flops
            wanted = wanted - computed | reads
        return self.total * len(compute) / left if left else 1.0

    def _forward(self, row: NDArray[np.bool_], stored: frozenset[int]) -> tuple[int, frozenset[int]]:
        """FLOPs of a forward that must produce its outputs and the cuts `stored`, and the cuts that it reads."""
        key = row.tobytes(), stored
        if key not in self._known:
            reached = {len(self._site_of), *stored}  # the last region belongs to the outputs
            pending, reads = list(reached), set()
            while pending:
                for cut in self._regions[pending.pop()].reads:
                    if not row[self._site_of[cut]]:
                        reads.add(cut)
                    elif cut not in reached:
                        reached.add(cut)
                        pending.append(cut)
            done = self._work[sorted(reached)].any(axis=0)
            self._known[key] = int(self._flops[done].sum()), frozenset(reads)
        return self._known[key]

    def _checked(self, mask: ArrayLike, dimensions: int) -> NDArray[np.bool_]:
        found = np.asarray(mask)
        if found.dtype != bool:
            raise TypeError(f"a mask is boolean, True where a site computes; this one is of {found.dtype}")
        if found.ndim != dimensions or found.shape[-1] != len(self.sites):
            expected = f"[steps, {len(self.sites)}]" if dimensions == 2 else f"[{len(self.sites)}]"
            raise ScheduleMismatchError(f"a mask of shape {expected} was expected, this one is {list(found.shape)}")
        return found


def count_costs(model: nn.Module, sites: Sequence[str], call: Callable[[], object]) -> SiteCosts:
    """Run `call` once, without gradients, and count what each site costs.

    Args:
        model: the denoiser.
        sites: dotted module paths. All calls of a site within the forward are reused together.
        call: runs one forward of `model` and returns its outputs.

    Raises:
        SiteError: the model lacks a site, one site lies inside another, or a site does not run in the forward.
        ValueError: `call` returned no tensor that was computed in it.
    """
    check_sites(model, sites)
    recording = _Recording()
    recorder = _Recorder(recording)
    with _marked(model, sites, recorder), _attention_in_the_open(), torch.inference_mode(False), torch.no_grad():
        with recorder:
            outputs = call()
        recording.outputs = recorder.producers(outputs)
    idle = [site for index, site in enumerate(sites) if index not in recording.cuts.values()]
    if idle:
        raise SiteError(
            f"{len(idle)} of {len(sites)} sites give no tensor in this forward of {type(model).__name__}, the first is "
            f"{idle[0]}; choose sites that run in every forward"
        )
    if not recording.outputs:
        raise ValueError("call returned no tensor that it computed; it has to return what the model's forward returns")
    return SiteCosts(sites, recording)


@dataclass
class _Recording:
    """One forward as a graph; nodes are numbered in execution order.

    Attributes:
        inputs: the nodes that each node depends on.
        flops: FLOPs of each node.
        cuts: site index by node, for the nodes that a site's output passes through.
        outputs: the nodes that the forward's outputs come from.
    """

    inputs: list[frozenset[int]] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    cuts: dict[int, int] = field(default_factory=dict)
    outputs: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Region:
    """What one output needs, back to the nearest cuts: the nodes that have FLOPs, and the numbers of those cuts."""

    work: frozenset[int]
    reads: frozenset[int]


def _regions(recording: _Recording) -> list[_Region]:
    """The region of each cut, followed by that of the forward's outputs."""
    number = {node: cut for cut, node in enumerate(recording.cuts)}
    return [
        _region(recording, number, starts)
        for starts in (*(recording.inputs[node] for node in recording.cuts), recording.outputs)
    ]


def _region(recording: _Recording, number: dict[int, int], starts: Iterable[int]) -> _Region:
    reached = set(starts)
    pending, reads = list(reached), set()
    while pending:
        node = pending.pop()
        if node in number:
            reads.add(number[node])
            continue
        fresh = recording.inputs[node] - reached
        reached |= fresh
        pending.extend(fresh)
    return _Region(frozenset(node for node in reached if recording.flops[node]), frozenset(reads))


class _Recorder(TorchDispatchMode):
    """Records every operator.

    A value is identified by its storage, so views cost nothing and a write through one view is seen in all of them.
    Weak references to storages let their memory be freed as usual, but keep their addresses from being reused.
    """

    def __init__(self, recording: _Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording
        self._producer: dict[StorageWeakRef, int] = {}

    def producers(self, values: object) -> frozenset[int]:
        """The nodes that produced the tensors in a pytree; weights and inputs have none."""
        found = (self._producer.get(_storage(tensor)) for tensor in _tensors(values))
        return frozenset(node for node in found if node is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:  # inference mode passes composite operators on undecomposed
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = self.producers((args, kwargs))
        result = func(*args, **kwargs)
        written = {_storage(tensor) for tensor in _written(func, args, kwargs)}
        fresh = {_storage(tensor) for tensor in _tensors(result)} - {_storage(t) for t in _tensors((args, kwargs))}
        if written or fresh:
            node = len(self.recording.inputs)
            self.recording.inputs.append(inputs)
            self.recording.flops.append(int(formula(*args, **kwargs, out_val=result)) if formula else 0)
            self._producer.update(dict.fromkeys(written | fresh, node))
        return result


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _tensors(values: object) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among the arguments that the operator writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[position] if position < len(args) else kwargs.get(argument.name))


@contextmanager
def _marked(model: nn.Module, sites: Sequence[str], recorder: _Recorder) -> Iterator[None]:
    """A context in which the outputs of sites are copies that the recording registers as cuts.

    They are copied because an output may be a view of a tensor that is also used elsewhere.
    """

    def mark(site: int, output: object) -> object:
        def copy(tensor: Tensor) -> Tensor:
            copied = tensor.clone()
            recorder.recording.cuts.update(dict.fromkeys(recorder.producers(copied), site))
            return copied

        return pytree.tree_map_only(Tensor, copy, output)

    handles = []
    try:
        for index, site in enumerate(sites):
            module = model.get_submodule(site)
            handles.append(module.register_forward_hook(lambda _, args, output, index=index: mark(index, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _attention_in_the_open() -> Iterator[None]:
    """A context in which nn.MultiheadAttention does not run as one fused operator, which has no FLOP formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


_FORMULAS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
}
