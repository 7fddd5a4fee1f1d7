"""Records one forward of a model operator by operator, with its data flow and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


@dataclass
class Recording:
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


class Recorder(TorchDispatchMode):
    """Records every operator.

    A value is identified by its storage, so views cost nothing and a write through one view is seen in all of them.
    Weak references to storages let their memory be freed as usual, but keep their addresses from being reused.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording
        self._producer: dict[StorageWeakRef, int] = {}

    def producers(self, values: object) -> frozenset[int]:
        """The nodes that produced the tensors in a pytree; parameters and inputs have none."""
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
def marked(model: nn.Module, sites: Sequence[str], recorder: Recorder) -> Iterator[None]:
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
def unfused_attention() -> Iterator[None]:
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
