"""What the double has to know of an operator before it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tests.cuda_double.queue import as_on_a_device

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
EMPTY = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
_SEEN: dict[Any, Any] = {}


def tensors_in(values: Any) -> list[torch.Tensor]:
    """All tensors of nested tuples, lists and dicts, which are all that operators take and return."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, tuple | list):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


def with_tensors(change: Callable[[torch.Tensor], Any], values: Any) -> Any:
    """Such values with every tensor changed."""
    if isinstance(values, torch.Tensor):
        return change(values)
    if isinstance(values, dict):
        return {name: with_tensors(change, value) for name, value in values.items()}
    if isinstance(values, tuple | list):
        return [with_tensors(change, value) for value in values]
    return values


def arguments(func: Any, args: Any, kwargs: Any) -> list[tuple[list[torch.Tensor], bool]]:
    """The tensors of each argument, and whether it is written."""
    by_place, by_name = _writes(func)
    pairs = [*zip(args, by_place, strict=False), *((value, by_name[name]) for name, value in kwargs.items())]
    return [(tensors, writes) for value, writes in pairs if (tensors := tensors_in(value))]


@functools.cache
def _writes(func: Any) -> tuple[list[bool], dict[str, bool]]:
    """Whether each argument is written: by place, and by name."""
    given = func._schema.arguments
    return [argument.is_write for argument in given], {argument.name: argument.is_write for argument in given}


@functools.cache
def is_view(func: Any) -> bool:
    """Whether it returns views of its arguments, or makes an argument a view of something else: nothing is launched."""
    if torch.Tag.inplace_view in func.tags or func.overloadpacket is aten.set_:
        return True
    return not func._schema.is_mutable and any(result.alias_info is not None for result in func._schema.returns)


@functools.cache
def is_made_of_others(func: Any) -> bool:
    """Whether it calls other operators on every device."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def waits(func: Any, args: Any) -> bool:
    """Whether the host waits for values: for a number, or for a size that depends on them."""
    if func.overloadpacket in _INDEXING:
        return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


@functools.cache
def draws(func: Any) -> bool:
    """Whether it draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def outputs_like(func: Any, args: Any, kwargs: Any) -> Any:
    """Its result for zeros of the same shapes, with the same shapes and strides as the true one. Draws are made."""
    if draws(func):
        return _run_on_zeros(func, args, kwargs)
    key = (func, torch.is_inference_mode_enabled(), _kind(args), _kind(kwargs))
    found = _SEEN.get(key)
    if found is None:
        found = _SEEN[key] = _run_on_zeros(func, args, kwargs)
    return found


def _kind(value: Any) -> Any:
    """What the layout of a result may depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        return tuple((name, _kind(inner)) for name, inner in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    return type(value), value


def _run_on_zeros(func: Any, args: Any, kwargs: Any) -> Any:
    with as_on_a_device():
        zeros = with_tensors(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).zero_(), (args, kwargs))
        return func(*zeros[0], **zeros[1])


def runner(func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Callable[[], None]:
    """What the launch does: compute, and write the result to `outputs`. It draws what it would have drawn now."""
    generator = kwargs.get("generator") or torch.default_generator
    state = generator.get_state() if draws(func) else None

    def run() -> None:
        before = generator.get_state() if state is not None else None
        if state is not None:
            generator.set_state(state)
        try:
            results = tensors_in(func(*args, **kwargs))
        finally:
            if before is not None:
                generator.set_state(before)
        for output, result in zip(outputs, results, strict=bool(outputs)):
            output.copy_(result)

    return run
