"""Which inputs of a denoiser stay the same over a run, and whether they still do.

A pipeline may swap the prompt in mid-run, or stop calling for the unconditional half, so that the k-th call of a step
is suddenly another one. Reusing features across such a change gives a wrong image without an error. So every stream
remembers the inputs that do not change from step to step: those whose name says so (prompt embeddings, class labels,
masks), and those seen unchanged between its first two calls, but for a ControlNet's residuals. Identity and version are
compared first, values only where those differ; a tensor written through `.data` keeps both, so that is not seen.
Inference tensors have no version: on a CPU their values are compared, elsewhere that would make the host wait at every
step, so the same tensor is taken for unchanged, compared on the device, and the verdict read when the run ends.
"""

from __future__ import annotations

import torch

from harmonica_rt.capture.call import Call
from harmonica_rt.capture.roles import is_request, is_residual
from harmonica_rt.errors import RunError


class Conditioning:
    """The conditioning inputs of one stream in one run; all its calls have one signature."""

    def __init__(self, call: Call) -> None:
        latents = _latents(call)
        self._held = {
            index: _Held(leaf)
            for index, (path, leaf) in enumerate(zip(call.paths, call.leaves, strict=True))
            if isinstance(leaf, torch.Tensor) and path != latents and not is_residual(path)
        }
        self._paths = call.paths
        self._required = frozenset(index for index in self._held if is_request(call.paths[index]))
        self._learned = False

    def recognises(self, call: Call) -> bool:
        """Whether all conditioning is the very tensors of the last call, unwritten: told without looking at values."""
        leaves = call.leaves
        return self._learned and all(held.recognises(leaves[index]) for index, held in self._held.items())

    def unchanged(self, call: Call) -> frozenset[int]:
        """Indices of the held inputs that have the same values in `call`."""
        held, leaves = self._held, call.leaves
        found = frozenset(index for index in held if held[index].same(leaves[index]))
        return self._required if found == self._required else found

    def accepts(self, unchanged: frozenset[int]) -> bool:
        """Whether a call with these unchanged inputs goes on with the same request."""
        return unchanged >= self._required

    def advance(self, call: Call, unchanged: frozenset[int]) -> None:
        """Take note of an accepted call; the first one after the beginning tells which inputs are conditioning."""
        if not self._learned:
            self._required = unchanged
            self._learned = True
            self._held = {index: self._held[index] for index in unchanged}
        for index, held in self._held.items():
            if call.leaves[index] is not held.tensor:
                self._held[index] = _Held(call.leaves[index])

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

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        # Inference tensors keep no version, so nothing but a copy can tell that one was overwritten.
        self._version = None if tensor.is_inference() else tensor._version
        self._copy = tensor.clone() if tensor.is_inference() else None
        self.overwritten: torch.Tensor | None = None  # on the device

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


def _latents(call: Call) -> str | None:
    """The first argument, unless its name says that it is conditioning."""
    first = call.convention.first_argument
    return None if first is not None and is_request(first) else first
