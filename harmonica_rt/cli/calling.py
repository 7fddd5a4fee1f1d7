"""Makes the arguments of a pipeline's call from the command line, and turns errors of the call into messages."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from harmonica_rt.cli.command import out_of_memory
from harmonica_rt.errors import HarmonicaError


@contextmanager
def calling(pipeline: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Within this block, an error that the pipeline raises for its arguments becomes a HarmonicaError.

    Args:
        pipeline: the pipeline that is called.
        arguments: the arguments of its call, for the message.
    """
    try:
        yield
    except HarmonicaError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise HarmonicaError(
            f"{type(pipeline).__name__} failed when called with {given}: {type(error).__name__}: {error} "
            "(`harmonica-rt --debug ...` shows where it failed)"
        ) from error


def call_arguments(pipeline: Any, given: Sequence[str], steps: int, guidance: float | None) -> dict[str, Any]:
    """The arguments of the pipeline's call: the given `name=value` pairs, and defaults for what they leave out.

    Raises:
        HarmonicaError: a pair has no `=`, sets `generator`, repeats `--guidance`, or names an unknown argument.
    """
    known = [name for name in inspect.signature(type(pipeline).__call__).parameters if name != "self"]
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if "class_labels" in known:
        arguments["class_labels"] = [0, 1]
    elif "prompt" in known:
        arguments["prompt"] = "a photo"
    chosen = pairs("--arg", given)
    if guidance is not None:
        if "guidance_scale" in chosen:
            raise HarmonicaError("--guidance and --arg guidance_scale=... set the same argument; give one of them")
        arguments["guidance_scale"] = guidance
    for name, value in chosen.items():
        if name == "generator":
            raise HarmonicaError(f"--arg {name}: generators are made from --seed")
        if name not in known:
            raise HarmonicaError(f"{type(pipeline).__name__} takes no argument {name!r}; it takes {', '.join(known)}")
        arguments[name] = value
    return arguments


def pairs(option: str, given: Sequence[str]) -> dict[str, Any]:
    """The `name=value` pairs given to an option; a value that is not JSON is text.

    Raises:
        HarmonicaError: a pair has no `=`.
    """
    found: dict[str, Any] = {}
    for pair in given:
        name, separator, text = pair.partition("=")
        if not separator:
            raise HarmonicaError(f"{option} {pair}: expected name=value")
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):  # not JSON, or nested deeper or longer than json reads
            found[name] = text
    return found
