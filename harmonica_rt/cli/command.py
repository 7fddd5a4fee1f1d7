"""Ends a command that cannot do its work: an expected failure is one message that names options of the command."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand

from harmonica_rt.cli import packages, signals
from harmonica_rt.cli.console import tell
from harmonica_rt.errors import HarmonicaError

_ARGUMENTS = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
"""Arguments of a pipeline's call -> the parameters of commands that set them."""


class Command(TyperCommand):
    """A command that raises expected failures as `HarmonicaError` or `OSError` and turns signals into exit statuses."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        names = {parameter.name: max(parameter.opts, key=len) for parameter in self.params if parameter.name}
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            tell("interrupted")
            raise typer.Exit(signals.exit_status(stop)) from None
        except HarmonicaError as error:
            text = in_options(str(error), names)
            if text == str(error):
                raise
            raise HarmonicaError(text) from error
        except ImportError as error:
            remedy = packages.remedy(error)
            if remedy is None:
                raise
            raise HarmonicaError(f"{ctx.info_name}: {remedy}") from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise HarmonicaError(_no_memory(error, names)) from error


def in_options(text: str, names: dict[str, str]) -> str:
    """A message of the library, with options in place of the Python names that they set.

    Args:
        text: the message.
        names: parameter of the command -> option, such as `target_speedup` -> `--target-speedup`.
    """
    known = {name: option for name, option in names.items() if option.startswith("--")}
    for argument, parameter in _ARGUMENTS.items():
        if parameter in known:
            known[argument] = known[parameter]
        elif "arg" in known:
            known[argument] = f"--arg {argument}=VALUE"
    # A word without underscores is a parameter only at the start of a message; one with underscores is one anywhere.
    text = re.sub(r"^[a-z]+(?=:)", lambda match: known.get(match.group(), match.group()), text)
    word = r"(?<![\w./=-])[a-z]+(?:_[a-z]+)+(?![\w/=(])"
    return re.sub(word, lambda match: known.get(match.group(), match.group()), text)


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python raised this error because memory ran out."""
    # By name: torch is not imported before a command needs it.
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)
    return isinstance(error, MemoryError) or named


def _no_memory(error: BaseException, names: dict[str, str]) -> str:
    remedies = {"batch": "a smaller --batch", "checkpointing": "--checkpointing", "dtype": "--dtype bf16"}
    known = [text for name, text in remedies.items() if name in names] or ["a smaller model"]
    detail = str(error).strip().partition("\n")[0]
    return f"out of memory{': ' if detail else ''}{detail}; it takes less with {' or '.join(known)}"
