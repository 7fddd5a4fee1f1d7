"""Turns a graph traced by torch.compile into a captured graph.

Dynamo hands over a graph of torch functions. Its arguments are the parameters and the call's tensors, mixed, in the
order dynamo met them. Only their *sources* (see `dynamo_frame`) tell which of them are parameters, and which argument
of the call a tensor is. Plain values are baked in, and guarded by dynamo.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from harmonica_rt.call.call import Call, CallConvention
from harmonica_rt.capture.captured_graph import CapturedGraph, CapturedModel, Placeholders
from harmonica_rt.capture.closed_values import fold_closed_values
from harmonica_rt.capture.dynamo_frame import SEE_THE_BREAK, Frame, module_path, path_steps, source_name
from harmonica_rt.capture.dynamo_replay import Replay
from harmonica_rt.capture.export import export_functional
from harmonica_rt.capture.sites import site_columns, site_of
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.model.training_mode import check_draws_nothing, modes_of

_GRAPH = "torch.compile graph"  # the leaf that distinguishes calls of one graph from those of another
_unique = itertools.count()


@dataclass(frozen=True)
class GraphCall(Call):
    """A call of a dynamo graph. Its `kwargs` are the tensors and numbers that the graph takes, by dotted path."""

    graph: DynamoGraph
    values: tuple[Any, ...]

    def parameters(self) -> dict[str, torch.Tensor]:
        """The parameters that came with the call, by name."""
        return {name: self.values[index] for index, name in self.graph.parameters.items()}


class DynamoGraph:
    """One graph of a model's forward, with its arguments classified and its sites known.

    Args:
        module: the graph module that dynamo passes to a backend.
        frame: from `traced_frame`.
        sites: site paths in the model.

    Attributes:
        parameters: index of the graph's argument -> its name in the model, or its source if it lies outside the model.
        inputs: index of the graph's argument -> its dotted path in the call.
        numbers: index of the graph's argument -> its dotted path in the call, or its source, for a number that the
            graph uses and that dynamo made symbolic because it changed between calls (a size, a scale, an epsilon).
            Each value gets its own plan.

    Raises:
        CaptureError: the graph is only a part of the model's forward and lacks sites, or it holds parameters itself.
    """

    def __init__(self, module: fx.GraphModule, frame: Frame, sites: Sequence[str]) -> None:
        self.module = module
        self.parameters: dict[int, str] = {}
        self.inputs: dict[int, str] = {}
        self.numbers: dict[int, str] = {}
        self._sites = tuple(sites)
        self._modes = modes_of(frame.model)
        self._columns = site_columns(frame.model, sites)
        self._prefix = frame.name
        self._arguments = _GraphArguments(frame)
        arguments = module.graph.find_nodes(op="placeholder")
        for index, node in enumerate(arguments):
            source = source_name(node.meta["grapharg"].source)
            if _is_number(node):
                if node.users:  # a view's storage offset may be passed without being used
                    self.numbers[index] = self._arguments.path(source) or source
            elif source.startswith(frame.name):
                self.parameters[index] = module_path(source, frame.name)
            elif (path := self._arguments.path(source)) is not None:
                self.inputs[index] = path
            else:
                self.parameters[index] = source
        self._key = _digest(module.graph, [arguments[index] for index in self.parameters])
        self._check_whole(frame)

    def call(self, values: tuple[Any, ...]) -> GraphCall:
        """The call that these arguments of the graph amount to."""
        kwargs = {path: values[index] for index, path in self.inputs.items()}
        kwargs.update((path, _as_number(values[index])) for index, path in self.numbers.items())
        call = self._arguments.normalise((), {**kwargs, _GRAPH: self._key})
        return GraphCall(call.kwargs, call.leaves, call.signature, call.convention, self, values)

    def capture(self, call: GraphCall) -> CapturedGraph:
        """Capture the graph for calls with the signature of `call`.

        Raises:
            CaptureError: the graph cannot be captured; see `capture.capture`.
        """
        started = time.perf_counter()
        values = [_as_number(value) if index in self.numbers else value for index, value in enumerate(call.values)]
        exported = export_functional(Replay(self.module), tuple(values), {})
        check_draws_nothing(exported.graph, self._modes)
        placeholders = Placeholders.of(exported, len(call.values))
        arguments = placeholders.inputs
        leaf = {path: index for index, path in enumerate(call.paths)}
        captured = CapturedModel(
            graph=exported.graph,
            root=exported.graph_module,
            parameters={name: self.parameters[index] for name, index in arguments.items() if index in self.parameters},
            constants=fold_closed_values(exported.graph, placeholders.constants),
            inputs={name: leaf[self.inputs[index]] for name, index in arguments.items() if index in self.inputs},
            out_spec=exported.call_spec.out_spec,
            seconds=time.perf_counter() - started,
        )
        return captured.marked(self._sites, self._site_at)

    def _site_at(self, path: str) -> int | None:
        return self._columns.get(module_path(path, self._prefix)) if path.startswith(self._prefix) else None

    def _check_whole(self, frame: Frame) -> None:
        if next(self.module.parameters(), None) is not None:
            detail = (
                "dynamo keeps parameters inside the graph; set torch._dynamo.config.inline_inbuilt_nn_modules = True"
            )
            raise CaptureError(CaptureFailure(Obstacle.EXPORT, detail))
        reason: Any = self.module.compile_subgraph_reason
        resumed = frame.code.co_name.startswith("torch_dynamo_resume_in")
        present = {site_of(node, self._site_at) for node in self.module.graph.nodes}
        missing = [site for index, site in enumerate(self._sites) if index not in present]
        if missing and (reason.graph_break or resumed):
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            detail = (
                f"a graph break cut its forward into parts, and one of them lacks {len(missing)} of "
                f"{len(self._sites)} sites: {shown}. {SEE_THE_BREAK}"
            )
            raise CaptureError(CaptureFailure(Obstacle.EXPORT, detail, node=frame.code.co_name))


class _GraphArguments(CallConvention):
    """The model's call convention for a graph, which takes tensors at dotted paths and not every argument."""

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame.model)
        self._forward = self._forward.open_to_any_name()
        self._locals, self._varargs, self._varkw = inspect.getargs(frame.code)
        # a wrapper may take the model as its first argument; the call's own arguments then begin one later
        self._offset = 1 if frame.name == f"L['{self._varargs}'][0]" else 0

    def path(self, source: str) -> str | None:
        """Dotted path of the argument at `source`; None if it is not an argument of the traced call."""
        if not source.startswith("L["):
            return None
        head, *rest = path_steps(source)
        if head == self._varkw and rest:
            return ".".join(rest)
        if head == self._varargs and rest:
            index = int(rest[0]) - self._offset
            if index < len(self._forward.positional):
                return ".".join((self._forward.positional[index], *rest[1:]))
        elif head not in self._locals:
            return None  # a local of an enclosing function
        return ".".join((head, *rest))


def _is_number(argument: fx.Node) -> bool:
    """Whether an argument of the graph is a number: a symbol, or a tensor of which only `item()` is used."""
    if not isinstance(argument.meta["example_value"], torch.Tensor):
        return True
    is_passed_as_tensor: bool = argument.meta["grapharg"].pass_arg_as_tensor
    return is_passed_as_tensor and all(user.target == "item" for user in argument.users)


def _as_number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _digest(graph: fx.Graph, parameters: Sequence[fx.Node]) -> str:
    """A digest, equal for equal graphs over parameters of the same layout; dynamo makes a graph for each grad mode."""
    if graph.find_nodes(op="get_attr"):
        return f"graph {next(_unique)}"  # tensors and subgraphs have no text to compare
    layouts = [_layout(node.meta["example_value"]) for node in parameters]
    used = [node.format_node() for node in graph.nodes if node.users or node.op != "placeholder"]
    return hashlib.sha256(f"{used}\n{layouts}".encode()).hexdigest()


def _layout(parameter: Any) -> Any:
    if not isinstance(parameter, torch.Tensor):
        return parameter
    return (tuple(parameter.shape), parameter.stride(), parameter.dtype, parameter.device)
