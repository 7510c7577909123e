"""`adaconvert card CKPT`."""

from __future__ import annotations

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Argument, Command
from adaconvert.cli.options import option
from adaconvert.cli.settings import begin, verbosity_options


@click.command("card", cls=Command)
@click.argument(
    "checkpoint",
    cls=Argument,
    metavar="CKPT",
    describe="Checkpoint folder that adaconvert wrote.",
)
@option(
    "output",
    "--overwrite",
    is_flag=True,
    help="Write the card anew even if it was edited.",
)
@options.json_option()
@verbosity_options
def card(checkpoint: str, overwrite: bool, as_json: bool) -> None:
    """Write the model card of a checkpoint anew.

    README.md is made from adaconvert.json and config.json alone: what was done in every stage,
    what was proven or measured, what it costs, how to load it. A card that was edited stays as it
    is unless --overwrite is given.
    """
    begin(versions.READING)
    from adaconvert import api

    output.show(api.card(checkpoint, overwrite=overwrite), as_json=as_json)
