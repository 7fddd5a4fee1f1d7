"""Which inputs of a denoiser make up the request of a stream, and whether they are still the same.

A pipeline may swap the prompt in mid-run, or stop calling for the unconditional half, so that the k-th call of a step
is suddenly another one. Reusing features across such a change gives a wrong image without an error. So every stream
remembers, from its first call on, all inputs but those known to change from step to step (`call.roles`). Identity
and version are compared first, values only where those differ; a tensor written through `.data` keeps both, so that is
not seen. Inference tensors have no version: on a CPU their values are compared; elsewhere that would make the host wait
in every step, so the same tensor is taken for unchanged and compared on the device, and the verdict is read when the
run ends.
"""

from __future__ import annotations

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.call.roles import Role, roles
from harmonica_rt.errors import RunError


class Conditioning:
    """The request of one stream in one run; all its calls have one signature."""

    def __init__(self, call: Call) -> None:
        self._paths = call.paths
        self._held = {
            index: _Held(leaf)
            for index, (role, leaf) in enumerate(zip(roles(call), call.leaves, strict=True))
            if role is Role.REQUEST and isinstance(leaf, torch.Tensor)
        }

    def recognises(self, call: Call) -> bool:
        """Whether all of it is the very tensors of the last call, unwritten: told without looking at values."""
        leaves = call.leaves
        return all(held.recognises(leaves[index]) for index, held in self._held.items())

    def changed(self, call: Call) -> list[str]:
        """Paths of the inputs that have other values in `call`."""
        return [self._paths[index] for index, held in self._held.items() if not held.same(call.leaves[index])]

    def advance(self, call: Call) -> None:
        """Hold the tensors of a call in which nothing changed, to recognise them in the next."""
        for index, held in self._held.items():
            if call.leaves[index] is not held.tensor:
                self._held[index] = _Held(call.leaves[index], held.overwritten)

    def end(self) -> None:
        """The run is over.

        Raises:
            RunError: an input taken for unchanged was overwritten.
        """
        for index, held in self._held.items():
            if held.overwritten is not None and bool(held.overwritten):
                raise RunError(
                    f"{self._paths[index]} was overwritten in mid-run, in inference mode where no one is told: the "
                    "result of this run is wrong. Pass a new tensor instead, or sample under torch.no_grad()"
                )


class _Held:
    """A tensor as it was, told from what it is now."""

    def __init__(self, tensor: torch.Tensor, overwritten: torch.Tensor | None = None) -> None:
        self.tensor = tensor
        # Inference tensors keep no version, so nothing but a copy can tell that one was overwritten.
        self._version = None if tensor.is_inference() else tensor._version
        self._copy = tensor.clone() if tensor.is_inference() else None
        self.overwritten = overwritten  # on the device

    def recognises(self, tensor: torch.Tensor) -> bool:
        if tensor is not self.tensor:
            return False
        if self._copy is None:
            return bool(tensor._version == self._version)
        if _is_read_at_once(tensor):
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


def _is_read_at_once(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"
