"""`adaconvert inspect SRC`."""

from __future__ import annotations

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Argument, Command
from adaconvert.cli.settings import begin, verbosity_options


@click.command("inspect", cls=Command)
@click.argument(
    "source",
    cls=Argument,
    metavar="SRC",
    describe="Checkpoint folder, hub-cache snapshot, or hub id such as org/name.",
)
@options.revision_option()
@options.json_option()
@verbosity_options
def inspect(source: str, revision: str | None, as_json: bool) -> None:
    """Say what a checkpoint is.

    Family, parameters in all and per token, FLOPs and weight bytes per token, dtype, ties and
    problems. Reads headers, not weights.
    """
    begin(versions.READING)
    from adaconvert import api

    output.show(api.inspect(source, revision=revision), as_json=as_json)
