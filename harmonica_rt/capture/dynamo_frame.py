"""The frame that torch.compile traces a graph from: finds its model, and ties the graph to that model by a guard.

Each argument of a graph has a *source*: an expression over the locals of the traced frame, such as
`L['self']._modules['embed']` or `L['kwargs']['timestep']`. Only the sources tell which module was traced.

Hazard: dynamo may run one graph for many models of one class, since parameters are arguments. A plan holds the state of
one model's runs, so a guard lets the graph run only for the model it was made for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import fx, nn
from torch._dynamo.guards import GuardBuilder, get_verbose_code_parts, install_guard
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Guard

from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.model.facts import Facts
from harmonica_rt.model.hooks import forward_hooks, forward_hooks_of_every_module
from harmonica_rt.model.identity import contents, first_change

SEE_THE_BREAK = "torch.compile(..., fullgraph=True) shows where dynamo breaks the graph, and why"

_STEP = re.compile(r"\[['\"](.*?)['\"]\]|\[(\d+)\]|\.(\w+)")
_TABLES = frozenset(("__dict__", "_modules", "_parameters", "_buffers"))


@dataclass(frozen=True)
class Frame:
    """The frame that dynamo traced.

    Attributes:
        model: the module whose parameters the graph uses.
        source: dynamo's source of the module; `name` is its expression.
        code: the traced function: the model's forward, a wrapper of it, or the remainder of it after a graph break.
    """

    model: nn.Module
    source: Any
    name: str
    code: CodeType

    def guard(self) -> None:
        """Let the graph run only for this very model, with the same code and hooks. Called while dynamo compiles."""
        install_guard(self.source.make_guard(GuardBuilder.ID_MATCH))
        install_guard(self.source.make_guard(_same_code))


def _same_code(builder: GuardBuilder, guard: Guard) -> None:
    """Guard what dynamo itself assumes constant about a model: above all methods of classes, and hooks.

    The guard holds no reference to the model, which dynamo does not keep alive.
    """
    model = builder.get(guard)
    held: list[Any] = [hooks for module in model.modules() for hooks in forward_hooks(module)]
    held += forward_hooks_of_every_module()
    held += [(cls, "forward") for cls in dict.fromkeys(map(type, model.modules()))]
    held += Facts(model).code()
    noted = list(map(contents, held))
    code = get_verbose_code_parts(f"___same_code({guard.name})", guard)
    builder.get_guard_manager(guard).add_lambda_guard(lambda _: first_change(held, noted) < 0, code, guard.user_stack)


def traced_frame(module: fx.GraphModule) -> Frame:
    """The frame that dynamo is compiling `module` for. Called while dynamo compiles.

    Raises:
        CaptureError: the graph uses no module.
    """
    traced = InstructionTranslator.current_tx().output.root_tx
    scope = {"L": traced.f_locals, "G": traced.f_globals}
    for node in module.graph.find_nodes(op="placeholder"):
        for source in _from_root(node.meta["grapharg"].source):
            value = _value(source_name(source), scope)
            if isinstance(value, nn.Module):
                return Frame(value, source, source_name(source), traced.f_code)
    detail = (
        f"a graph of {traced.f_code.co_name} uses no parameters: it is a forward hook on the model, or code around it; "
        f"compile the model itself, without hooks. {SEE_THE_BREAK}"
    )
    raise CaptureError(CaptureFailure(Obstacle.EXPORT, detail))


def _from_root(source: Any) -> Iterator[Any]:
    """The chain of sources that a source is built on, from the local or global variable to the source itself."""
    base = getattr(source, "base", None)
    if base is not None:
        yield from _from_root(base)
    yield source


def source_name(source: Any) -> str:
    """The expression of a source; its `name` is a method in older releases of torch, a property in newer ones."""
    name = source.name
    return str(name() if callable(name) else name)


def _value(expression: str, scope: dict[str, Any]) -> Any:
    """The value of a source's expression; None if it cannot be evaluated (some use functions known only to guards)."""
    try:
        return eval(expression, dict(scope))
    except (NameError, AttributeError, LookupError, TypeError, SyntaxError):
        return None


def path_steps(expression: str) -> list[str]:
    """The steps of an expression from its root: `['self', '_modules', 'blocks']`."""
    return ["".join(step) for step in _STEP.findall(expression)]


def module_path(expression: str, model: str) -> str:
    """The dotted path in the model: `blocks.0` for `L['self']._modules['blocks'].0`."""
    return ".".join(step for step in path_steps(expression[len(model) :]) if step not in _TABLES)
