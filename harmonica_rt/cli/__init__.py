"""`harmonica-rt`, the command line.

In: arguments, options and recipes. Out: text on standard output, messages on standard error, schedule files and
pictures; the exit status is 1 where a check failed, 2 where the command could not do its work.
Hazard: importing torch takes seconds. Heavy imports happen inside the commands, so that `--help` is instant.

Reading order: `options` (what commands share), `console` and `command` (how commands print and fail), `packages` (what
to install for a failed import), `signals` (Ctrl-C and SIGTERM), `loading` and `calling` (pipelines and the arguments of
their calls), `tables`; then one file per command or pair of commands: `demo`, `listing` (`sites`, `recipes`),
`checking` (`verify`, `bench`), `schedule`, `fitting` (`schedule fit`), `doctor`, and `train` with `conditions` (what it
generates), `keeping` (its schedule is not lost) and `going_on` (how to continue an interrupted training).
"""

from __future__ import annotations

import sys

import typer

from harmonica_rt import __version__
from harmonica_rt.cli import schedule, signals
from harmonica_rt.cli.checking import bench, verify
from harmonica_rt.cli.command import Command
from harmonica_rt.cli.console import fail, set_debug
from harmonica_rt.cli.demo import demo
from harmonica_rt.cli.doctor import doctor
from harmonica_rt.cli.fitting import fit
from harmonica_rt.cli.listing import recipes, sites
from harmonica_rt.cli.train import train
from harmonica_rt.errors import HarmonicaError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
schedule.app.command(cls=Command)(fit)
app.add_typer(schedule.app, name="schedule", help="Show, make, fit, convert and draw schedule files.")
for function in (demo, sites, recipes, verify, bench, train, doctor):
    app.command(cls=Command)(function)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"harmonica-rt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of errors and all messages of libraries."),
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
