"""`harmonica-rt`, the command line. Heavy imports happen inside the commands, so that `--help` is instant."""

from __future__ import annotations

import sys

import typer

from harmonica_rt import __version__
from harmonica_rt.cli import pipeline, schedule, signals
from harmonica_rt.cli.command import Command
from harmonica_rt.cli.console import fail, set_debug
from harmonica_rt.cli.doctor import doctor
from harmonica_rt.cli.train import train
from harmonica_rt.errors import HarmonicaError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(schedule.app, name="schedule", help="Show, make, convert and draw schedule files.")
for function in (pipeline.demo, pipeline.sites, pipeline.recipes, pipeline.verify, pipeline.bench, train, doctor):
    app.command(cls=Command)(function)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"harmonica-rt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of errors, and all that libraries say."),
) -> None:
    """Run Diffusion Transformers with cached features, planned ahead."""
    set_debug(debug)


def main() -> None:
    """Run the command line; errors of this package and of the file system end as one message and exit status 2."""
    with signals.raised():
        try:
            app()
        except (HarmonicaError, OSError) as error:
            sys.exit(fail(error))
