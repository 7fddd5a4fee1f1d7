"""Trace a module into one functional graph."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import ConstantArgument, OutputKind, TensorArgument
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from harmonica_rt.capture.one_thread import keep_from_other_threads
from harmonica_rt.changes import Changes
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.graph.facts import is_mutating
from harmonica_rt.graph.functionalise import functionalise
from harmonica_rt.graph.layout import same_layout
from harmonica_rt.torch_state import keep_torch_state, take_capture_lock


class GivenUp(Exception):
    """Carries the reason out of an abandoned trace.

    For some errors torch.export prints the graph; for this one it does not.
    """

    def __init__(self, failure: CaptureFailure) -> None:
        super().__init__()
        self.failure = failure


def export_functional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Trace `module` for these arguments into a graph without mutations and without identity operations.

    Raises:
        CaptureError: the module cannot be traced, or is not a function of its arguments.
    """
    changes = Changes()
    with changes, changes:
        take_capture_lock(changes)
        keep_torch_state(changes)
        keep_from_other_threads(changes)
        _silence_about_values(changes)
        exported = _exported(module, args, kwargs)
    _check_functional_signature(exported)
    remove_identities(exported.graph)
    return exported


def _exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    lazily = _use_lazy_graph_module(True)  # the intermediate modules of a trace are never called, so need no code
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad(), lazily:
        # Raised inside torch.export by torch's own use of its deprecated names.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        # Capture itself detects what a forward writes, and reports it as the reason.
        warnings.filterwarnings("ignore", category=UserWarning, message=".*assigned during export")
        args, kwargs = pytree.tree_map_only(torch.Tensor, _as_ordinary, (args, kwargs))
        try:
            exported = torch.export.export(module, args, kwargs, strict=False)
            _renew_users(exported.graph)
            return exported if functionalise(exported) else exported.run_decompositions({})
        except GivenUp as given_up:
            raise CaptureError(given_up.failure) from None
        except (CaptureError, MemoryError, torch.OutOfMemoryError):
            raise  # running out of memory is no fault of the model, which may be captured later
        except Exception as error:  # torch.export raises a dozen unrelated types; each becomes a reason, none is lost
            raise CaptureError(not_traced(error)) from error


def _has_advice(record: logging.LogRecord) -> bool:
    return "Unable to find user code" not in record.msg


def _silence_about_values(changes: Changes) -> None:
    """Keep torch from logging that it has no advice on a data-dependent size: the failure already reports the size."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    changes.undone_by(lambda: log.removeFilter(_has_advice))
    log.addFilter(_has_advice)


def _renew_users(graph: fx.Graph) -> None:
    """Rebuild the users of all nodes: torch.export loses some where it inlines a nested graph."""
    for node in graph.nodes:
        node.users.clear()
    for node in graph.nodes:
        for value in node.all_input_nodes:
            value.users[node] = None


def _as_ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor of the same layout and values: inference tensors cannot be traced."""
    return torch.empty_like(tensor).copy_(tensor) if tensor.is_inference() else tensor.detach()


def _check_functional_signature(exported: torch.export.ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind in (
            OutputKind.BUFFER_MUTATION,
            OutputKind.USER_INPUT_MUTATION,
            OutputKind.PARAMETER_MUTATION,
        ):
            raise CaptureError(CaptureFailure(Obstacle.MUTATION, f"it writes to {spec.target}"))
        if spec.kind is OutputKind.USER_OUTPUT and not isinstance(spec.arg, (TensorArgument, ConstantArgument)):
            raise CaptureError(CaptureFailure(Obstacle.OUTPUT, f"{type(spec.arg).__name__} among the outputs"))
    for node in exported.graph.nodes:
        if is_mutating(node):
            raise CaptureError(
                CaptureFailure(Obstacle.MUTATION, f"{node.target}", node=node.name, stack=node.meta.get("stack_trace"))
            )


def remove_identities(graph: fx.Graph) -> None:
    """Drop operations without effect from a functional graph: metadata asserts, clones, inactive dropout, `x / 1`.

    The graph's values stay the same bit for bit. A clone only matters if something is written in place later, and
    nothing is. (Signatures are compared before every call, so the asserts cannot fire.)
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    target, args = node.target, node.args
    if target is torch.ops.aten.clone.default:
        return _same_layout(node)
    if target is torch.ops.aten.dropout.default:
        return args[2] is False
    if target in (torch.ops.aten.div.Tensor, torch.ops.aten.mul.Tensor):
        return isinstance(args[1], (int, float)) and args[1] == 1 and _same_layout(node)
    return False


def _same_layout(node: fx.Node) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    return same_layout(node.meta["val"], source.meta["val"])


def not_traced(error: Exception) -> CaptureFailure:
    """The failure that reports that tracing a model raised `error`."""
    detail = f"{type(error).__name__}: {_first_line(error)}"
    return CaptureFailure(Obstacle.EXPORT, detail, stack=_where(error))


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def _where(error: BaseException) -> str | None:
    """The innermost frame of the model's own code, outside torch."""
    place, trace = None, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/torch/" not in code.co_filename and "harmonica_rt" not in code.co_filename:
            place = f"  in {code.co_name}, {code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
