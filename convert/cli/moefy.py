"""`adaconvert moefy SRC DST`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, splitting, versions
from adaconvert.cli.framework import Command
from adaconvert.cli.settings import begin, verbosity_options
from adaconvert.cli.upcycle import refuse_conflicts


@click.command("moefy", cls=Command)
@options.source_argument()
@options.destination_argument("Folder to write; must not exist yet, or be empty.")
@splitting.moefy_options()
@options.run_options()
@options.json_option()
@verbosity_options
def moefy(source: str, destination: str, as_json: bool, **settings: Any) -> None:
    """Split a dense checkpoint's feed-forward networks into experts.

    Nothing is lost: neurons are only put in another order, so with every expert on (the default)
    the result computes what the source computes, and `unmoefy` gives the source back bit for bit.
    Running fewer experts saves compute and costs quality, which is measured and said. The result
    carries the code it needs; DST appears whole or not at all.
    """
    refuse_conflicts(settings)
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    result = api.convert(
        source,
        destination=destination,
        method="moefy",
        progress=not heard.quiet,
        **settings,
    )
    if as_json or not heard.quiet:
        output.show(result, as_json=as_json)
