"""The captured graph: the model as one functional graph with every site marked."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from harmonica_rt.capture.request_values import RequestValues
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.indices import SiteIndex


@dataclass(frozen=True)
class CapturedGraph:
    """The model as one functional graph.

    Attributes:
        graph: its placeholders are parameters, constants and input leaves; its output node holds a flat tuple.
        root: the module that the graph's `get_attr` nodes refer to.
        parameters: placeholder name -> dotted name of the parameter or buffer in the model.
        constants: placeholder name -> tensor created by tracing.
        inputs: placeholder name -> index among the call's leaves.
        out_spec: the tree that turns the flat outputs into the model's own return type.
        sites: site paths, as in the schedule.
        site_outputs: the output nodes of each site, in graph order; empty for a site that does not run in this call.
        seconds: wall time of the capture.
        request_values: the values of the request that the graph was made for; None if it holds for all requests.
    """

    graph: fx.Graph
    root: nn.Module
    parameters: dict[str, str]
    constants: dict[str, torch.Tensor]
    inputs: dict[str, int]
    out_spec: pytree.TreeSpec
    sites: tuple[str, ...]
    site_outputs: tuple[tuple[fx.Node, ...], ...]
    seconds: float
    request_values: RequestValues | None = None

    @functools.cached_property
    def output(self) -> fx.Node:
        """The output node."""
        return self.graph.output_node()

    def outputs_of(self, site: SiteIndex) -> tuple[fx.Node, ...]:
        """Output nodes of one site."""
        return self.site_outputs[site]


@dataclass(frozen=True)
class Placeholders:
    """What the placeholders of a traced graph stand for; see the fields of the same names of `CapturedGraph`."""

    parameters: dict[str, str]
    constants: dict[str, torch.Tensor]
    inputs: dict[str, int]

    @classmethod
    def of(cls, exported: torch.export.ExportedProgram, leaves: int) -> Placeholders:
        """The placeholders of a trace of a call with this number of leaves.

        Raises:
            CaptureError: the graph takes an input of another kind, or another number of inputs than the call has.
        """
        parameters: dict[str, str] = {}
        constants: dict[str, torch.Tensor] = {}
        inputs: dict[str, int] = {}
        leaf = 0
        for spec in exported.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                if isinstance(spec.arg, TensorArgument):
                    inputs[spec.arg.name] = leaf
                leaf += 1
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
                parameters[spec.arg.name] = spec.target
            elif spec.kind is InputKind.CONSTANT_TENSOR and spec.target is not None:
                constants[spec.arg.name] = exported.constants[spec.target]
            else:
                raise CaptureError(
                    CaptureFailure(Obstacle.EXPORT, f"the graph takes an input of kind {spec.kind.name}")
                )
        if leaf != leaves:
            raise CaptureError(CaptureFailure(Obstacle.EXPORT, f"the graph takes {leaf} inputs, the call has {leaves}"))
        return cls(parameters, constants, inputs)
