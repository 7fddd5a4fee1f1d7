"""The captured graph: the model as one functional graph, and the same with the sites of a schedule marked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from harmonica_rt.capture.request_values import RequestValues
from harmonica_rt.capture.sites import find_marks, unchanged_input
from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.indices import SiteIndex


@dataclass(frozen=True)
class CapturedModel:
    """The model as one functional graph, for any schedule.

    Attributes:
        graph: its placeholders are parameters, constants and input leaves; its output node holds a flat tuple.
        root: the module that the graph's `get_attr` nodes refer to.
        parameters: placeholder name -> dotted name of the parameter or buffer in the model.
        constants: placeholder name -> tensor created by tracing.
        inputs: placeholder name -> index among the call's leaves.
        out_spec: the tree that turns the flat outputs into the model's own return type.
        seconds: wall time of the capture.
        request_values: the values of the request that the graph was made for; None if it holds for all requests.
        unchanged: paths of the modules that returned an input unchanged, and so cannot be sites.
    """

    graph: fx.Graph
    root: nn.Module
    parameters: dict[str, str]
    constants: dict[str, torch.Tensor]
    inputs: dict[str, int]
    out_spec: pytree.TreeSpec
    seconds: float
    request_values: RequestValues | None = None
    unchanged: frozenset[str] = frozenset()

    def marked(
        self, sites: Sequence[str], index_of: Callable[[str], int | None], *, seconds: float | None = None
    ) -> CapturedGraph:
        """This graph with the sites of a schedule marked.

        Args:
            sites: names of the sites.
            index_of: maps a module path, as written in `nn_module_stack`, to the index of its site, or to None.
            seconds: wall time that this schedule waited for the capture, 0 if it was kept; None: all of it.

        Raises:
            CaptureError: see `find_marks`; or a site returns one of its inputs unchanged.
        """
        for site in sites:
            if site in self.unchanged:
                raise unchanged_input(site)
        marks = find_marks(self.graph, sites, index_of, {*self.parameters, *self.constants})
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(CapturedModel)}
        given["seconds"] = self.seconds if seconds is None else seconds
        return CapturedGraph(**given, sites=tuple(sites), site_outputs=marks.outputs, bases=marks.bases)


@dataclass(frozen=True)
class CapturedGraph(CapturedModel):
    """The model as one functional graph with the sites of a schedule marked.

    Attributes:
        sites: names of the sites, as in the schedule.
        site_outputs: the output nodes of each site, in graph order; empty for a site that does not run in this call.
        bases: for each output of a span, the node that it is a residual of.
    """

    sites: tuple[str, ...] = ()
    site_outputs: tuple[tuple[fx.Node, ...], ...] = ()
    bases: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @functools.cached_property
    def output(self) -> fx.Node:
        """The output node."""
        return self.graph.output_node()

    def outputs_of(self, site: SiteIndex) -> tuple[fx.Node, ...]:
        """Output nodes of one site."""
        return self.site_outputs[site]

    def cached_value(self, node: fx.Node) -> torch.Tensor:
        """A fake tensor like what a slot holds for a site's output: that output, or its residual."""
        base = self.bases.get(node)
        value: torch.Tensor = node.meta["val"]
        return value if base is None else value - base.meta["val"]


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
