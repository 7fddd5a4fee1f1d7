"""Encodes prompts with a pipeline's own `encode_prompt`, and names the outputs as the pipeline's call does.

Hazard: each pipeline returns other values in another order, and its call takes some of them back. So the names are
read from the return statement. Outputs that the call does not take must come out the same when the others
are passed in again. Anything else is an error that asks for embeddings, never a guess.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harmonica_training.errors import TrainingError


class PromptEncoder:
    """The `encode_prompt` of a pipeline, called as the pipeline's call does.

    Args:
        pipeline: a diffusers pipeline with its text encoders.
        guidance: also encode a negative prompt.
        arguments: arguments of the pipeline's call; those that `encode_prompt` takes are used.

    Attributes:
        absent: arguments of the call that hold text by default, and must be None when embeddings are given.

    Raises:
        TrainingError: the pipeline's prompts cannot be encoded in this general way, or it does not take an argument.
    """

    def __init__(self, pipeline: Any, *, guidance: bool, arguments: Mapping[str, Any]) -> None:
        self._pipeline, self._class, self._guidance = pipeline, type(pipeline), guidance
        self._call, self._encode = call_parameters(self._class), _parameters(self._class, "encode_prompt")
        self._outputs = encoded_names(self._class)
        encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
        if encoders and all(part is None for part in encoders):
            raise _refusal(self._class, "was loaded without its text encoders")
        self._arguments = self._fixed(arguments)
        self.absent = [name for name, given in self._call.items() if _is_words(name) and given.default is not None]

    def encode(self, prompts: Sequence[str], negative_prompt: str) -> dict[str, Tensor]:
        """Embeddings `[N, ...]` of N prompts, keyed by the names of the call's arguments."""
        words, nothing = list(prompts), [negative_prompt] * len(prompts)  # some need one per prompt
        if "negative_prompt" in self._encode:
            encoded = self._taken({"prompt": words, "negative_prompt": nothing})
        else:
            encoded = self._taken({"prompt": words})
            negative = {name: f"negative_{name}" for name in self._outputs if f"negative_{name}" in self._call}
            if self._guidance and negative:  # the calls of such pipelines encode twice
                found = self._taken({"prompt": nothing})
                encoded |= {negative[name]: value for name, value in found.items() if name in negative}
        if (
            self._guidance
            and "negative_prompt" in self._call
            and not any(name.startswith("negative_") for name in encoded)
        ):
            raise _refusal(self._class, "takes a negative prompt in words only")
        return encoded

    def _fixed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of every `encode_prompt` call, explicit because its defaults may differ from the pipeline's."""
        unknown = [name for name in arguments if name not in self._call and name not in self._encode]
        if unknown:
            raise TrainingError(f"{self._class.__name__} takes no argument {', '.join(unknown)}")
        encoded = [name for name in arguments if _is_words(name) or name in self._outputs]
        if any(arguments[name] is not None for name in encoded):
            raise TrainingError(f"{', '.join(encoded)} cannot be among the arguments: that is what is encoded here")
        fixed: dict[str, Any] = {}
        for name, parameter in self._encode.items():
            if name in ("self", "prompt", "negative_prompt", *encoded) or parameter.kind is parameter.VAR_KEYWORD:
                continue
            if name in arguments:
                fixed[name] = arguments[name]
            elif name == "do_classifier_free_guidance":
                fixed[name] = self._guidance
            elif name == "device":
                fixed[name] = self._pipeline._execution_device
            elif re.fullmatch(r"num_\w+_per_prompt", name):
                fixed[name] = 1
            elif name == "clean_caption":
                fixed[name] = False  # cleaning needs packages that may be missing
            elif name in self._call and self._call[name].default is not parameter.empty:
                fixed[name] = self._call[name].default
            elif parameter.default is parameter.empty:
                raise _refusal(self._class, f"has an encode_prompt that also needs {name}")
        return fixed

    def _taken(self, words: Mapping[str, Any]) -> dict[str, Tensor]:
        """The outputs that the pipeline's call takes, without those that are None."""
        outputs = self._run(words)
        taken = {name: value for name, value in outputs.items() if name in self._call}
        for name, value in taken.items():
            if not (isinstance(value, Tensor) and value.ndim and len(value) == len(words["prompt"])):
                found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
                raise _refusal(self._class, f"encodes {len(words['prompt'])} prompts to {name} of {found}")
        if len(taken) < len(outputs):
            again = self._run({**words, **taken, "prompt": None})
            changed = [name for name in outputs if name not in taken and not _same(outputs[name], again.get(name))]
            if changed:
                raise _refusal(self._class, f"neither takes {', '.join(changed)} in its call nor recreates it")
        return taken

    def _run(self, words: Mapping[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            result = self._pipeline.encode_prompt(**{**self._arguments, **words})
        values = result if isinstance(result, tuple | list) else (result,)
        if len(values) != len(self._outputs):
            raise _refusal(self._class, f"returns {len(values)} values, not {', '.join(self._outputs)}")
        return {name: value for name, value in zip(self._outputs, values, strict=True) if value is not None}


def encoded_names(pipeline_class: type) -> tuple[str, ...]:
    """Names of the values that a pipeline's `encode_prompt` returns, in order.

    Raises:
        TrainingError: there is no `encode_prompt` for prompts, its source gives no names, or the call takes none of
            them, or needs others as well.
    """
    call, encode = call_parameters(pipeline_class), _parameters(pipeline_class, "encode_prompt")
    if "prompt" not in encode:
        raise _refusal(pipeline_class, "has no encode_prompt that takes a prompt")
    try:
        function = inspect.unwrap(inspect.getattr_static(pipeline_class, "encode_prompt"))
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise _refusal(pipeline_class, f"has an encode_prompt whose source cannot be read ({error})") from error
    returns = {tuple(_names(value)) for value in _returns(tree.body[0])}
    names = returns.pop() if len(returns) == 1 else ()
    if not names or "" in names:
        raise _refusal(pipeline_class, "has an encode_prompt whose return statements name different values, or none")
    taken = {name for name in names if name in call}
    # the call can recreate the values it does not take only if encode_prompt accepts the others
    if not taken or (len(taken) < len(names) and not taken <= set(encode)):
        raise _refusal(pipeline_class, f"does not take in its call what encode_prompt returns: {', '.join(names)}")
    lacking = [name for name in call if re.match(r"(pooled_)?prompt_embeds", name) and name not in names]
    if lacking:
        raise _refusal(pipeline_class, f"takes in its call what encode_prompt does not return: {', '.join(lacking)}")
    return names


def call_parameters(pipeline_class: type) -> Mapping[str, inspect.Parameter]:
    """Parameters of a pipeline's call."""
    return _parameters(pipeline_class, "__call__")


def _parameters(pipeline_class: type, method: str) -> Mapping[str, inspect.Parameter]:
    """Parameters of a method; empty if there is no such method."""
    function = getattr(pipeline_class, method, None)
    return {} if function is None else inspect.signature(function).parameters


def _returns(node: ast.AST) -> Iterator[ast.expr | None]:
    """The expressions that a function returns, excluding nested functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child.value
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _returns(child)


def _names(value: ast.expr | None) -> Iterator[str]:
    """Names of the elements of a returned tuple (or of the single value); "" for an element without one."""
    for element in value.elts if isinstance(value, ast.Tuple) else [value]:
        if isinstance(element, ast.IfExp):  # name if ... else None
            element = element.body
        if isinstance(element, ast.Call) and isinstance(element.func, ast.Attribute):  # name.to(...)
            element = element.func.value
        yield element.id if isinstance(element, ast.Name) else ""


def _is_words(name: str) -> bool:
    return re.fullmatch(r"(negative_)?prompt(_\d)?", name) is not None


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def _refusal(pipeline_class: type, why: str) -> TrainingError:
    return TrainingError(
        f"{pipeline_class.__name__} {why}, so its prompts cannot be encoded here; "
        f"encode them by hand and give embeddings: Embeddings({{...}}) or Embeddings.load(...)"
    )
