"""`adaconvert unmoefy SRC DST`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Command
from adaconvert.cli.settings import begin, verbosity_options
from adaconvert.cli.upcycle import refuse_conflicts


@click.command("unmoefy", cls=Command)
@options.source_argument()
@options.destination_argument("Folder to write; must not exist yet, or be empty.")
@options.apply(*options.plain_storage())
@options.run_options()
@options.json_option()
@verbosity_options
def unmoefy(source: str, destination: str, as_json: bool, **settings: Any) -> None:
    """Put a split checkpoint together again.

    Every neuron goes back to its place: tensors, names, dtypes, ties and config.json are those of
    the dense model, bit for bit where the weights were not trained since. Routers are dropped.
    """
    refuse_conflicts(settings)
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    result = api.unmoefy(source, destination, progress=not heard.quiet, **settings)
    if as_json or not heard.quiet:
        output.show(result, as_json=as_json)
