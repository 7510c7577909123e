"""`adaconvert depth SRC DST`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import deepening, options, output, versions
from adaconvert.cli.framework import Command
from adaconvert.cli.settings import begin, verbosity_options
from adaconvert.cli.upcycle import refuse_conflicts


@click.command("depth", cls=Command)
@options.source_argument()
@options.destination_argument("Folder to write; must not exist yet, or be empty.")
@deepening.depth_options()
@options.run_options()
@options.json_option()
@verbosity_options
def depth(source: str, destination: str, as_json: bool, **settings: Any) -> None:
    """Remove whole transformer blocks from a model, or let each token skip some.

    --kind layer-drop: DST is a stock checkpoint with fewer blocks: it computes what SRC computes
    with the others skipped. Say which blocks go (--drop), or how many stay (--keep, --compute),
    evenly spaced or found by a search on text. `finetune` then teaches the others to make up for
    them.

    --kind skip, mod: DST computes what SRC does, and has routers beside some blocks, by which each
    token runs them or not. DST appears whole or not at all.
    """
    refuse_conflicts(settings)
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    result = api.convert(
        source,
        destination=destination,
        method="depth",
        progress=not heard.quiet,
        **settings,
    )
    if as_json or not heard.quiet:
        output.show(result, as_json=as_json)
