"""The conditioning of a stream, the tensors of its request, and whether a call still has the same.

A pipeline may swap the prompt mid-run, or stop making the unconditional call, so that the k-th call of a step is
suddenly a different one. Reusing features across such a change gives a wrong image without an error. So every stream
remembers, from its first call on, all inputs except those known to change from step to step (`call.roles`).

Identity and version are compared first, and values only if those differ; a write through `.data` changes neither, so it
goes undetected. Inference tensors have no version. On a CPU their values are compared. Elsewhere that would make the
host wait at every step, so the same tensor is assumed to be unchanged and compared on the device, and the result is
fetched when the run ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.call.roles import Role, roles
from harmonica_rt.errors import RunError
from harmonica_rt.execute.launch_order import LaunchOrder


class Conditioning:
    """The conditioning of one stream in one run; all its calls have one signature."""

    def __init__(self, call: Call) -> None:
        self._paths = call.paths
        request = {
            index: leaf
            for index, (role, leaf) in enumerate(zip(roles(call), call.leaves, strict=True))
            if role is Role.REQUEST and isinstance(leaf, torch.Tensor)
        }
        self._held: dict[int, _Held] = {}
        self._copied = {leaf.device for leaf in request.values() if leaf.is_inference()}
        self._launches = LaunchOrder(self._copied)
        with self._turn():
            self._held.update((index, _Held(leaf)) for index, leaf in request.items())

    def recognises(self, call: Call) -> bool:
        """True if the tensors are those of the last call, not overwritten; waits for no device.

        An inference tensor on a device is taken on trust here: `end` reports it if it was overwritten.
        """
        leaves = call.leaves
        with self._turn():
            return all(held.recognises(leaves[index]) for index, held in self._held.items())

    def changed(self, call: Call) -> list[str]:
        """Paths of the inputs whose values differ in `call`."""
        with self._turn():
            return [self._paths[index] for index, held in self._held.items() if not held.same(call.leaves[index])]

    def advance(self, call: Call) -> None:
        """Hold the tensors of a call in which nothing changed, so that the next call can be recognised by them."""
        with self._turn():
            for index, held in self._held.items():
                if call.leaves[index] is not held.tensor:
                    self._held[index] = _Held(call.leaves[index], held.overwritten)

    def end(self) -> None:
        """The run is over.

        Raises:
            RunError: an input that was assumed to be unchanged had been overwritten.
        """
        with self._turn():
            found = [index for index, held in self._held.items() if held.overwritten is not None and held.overwritten]
        if found:
            raise RunError(
                f"{self._paths[found[0]]} was overwritten mid-run under torch.inference_mode(), which records no "
                "writes: the result of this run is wrong. Pass a new tensor instead, or sample under torch.no_grad()"
            )

    def _turn(self) -> AbstractContextManager[None]:
        """What copies are used in: the calls of a run may be launched on several CUDA streams."""
        return self._launches.turn(self._copies) if self._copied else nullcontext()

    def _copies(self) -> Iterator[torch.Tensor]:
        for held in self._held.values():
            yield from held.copies()


class _Held:
    """A tensor with its earlier state, to detect whether it has changed since."""

    def __init__(self, tensor: torch.Tensor, overwritten: torch.Tensor | None = None) -> None:
        self.tensor = tensor
        # Inference tensors keep no version, so only a copy can reveal that one was overwritten.
        self._version = None if tensor.is_inference() else tensor._version
        self._copy = tensor.clone() if tensor.is_inference() else None
        self.overwritten = overwritten  # on the device

    def copies(self) -> Iterator[torch.Tensor]:
        """What it holds besides the tensor."""
        yield from (own for own in (self._copy, self.overwritten) if own is not None)

    def recognises(self, tensor: torch.Tensor) -> bool:
        if tensor is not self.tensor:
            return False
        if self._copy is None:
            return bool(tensor._version == self._version)
        if _is_compared_at_once(tensor):
            return torch.equal(self._copy, tensor)
        changed = (self._copy != tensor).any()
        self.overwritten = changed if self.overwritten is None else self.overwritten | changed
        return True

    def same(self, tensor: torch.Tensor) -> bool:
        if self._copy is not None:
            return torch.equal(self._copy, tensor)
        if self.recognises(tensor):
            return True
        return self.tensor._version == self._version and torch.equal(self.tensor, tensor)


def _is_compared_at_once(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"
