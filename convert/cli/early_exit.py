"""`adaconvert early-exit SRC DST`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import exiting, options, output, versions
from adaconvert.cli.framework import Command
from adaconvert.cli.settings import begin, verbosity_options
from adaconvert.cli.upcycle import refuse_conflicts


@click.command("early-exit", cls=Command)
@options.source_argument()
@options.destination_argument("Folder to write; must not exist yet, or be empty.")
@exiting.early_exit_options()
@options.run_options()
@options.json_option()
@verbosity_options
def early_exit(source: str, destination: str, as_json: bool, **settings: Any) -> None:
    """Give a model exits after some of its blocks.

    Tokens may leave there once thresholds are set (`calibrate`), and generation may draft there
    and verify with the whole model. An exit begins as a copy of the model's own end; none is taken
    as written, so the result computes what SRC computes. `finetune --train exits` trains them.
    With --head shared, DST is a stock checkpoint. DST appears whole or not at all.
    """
    refuse_conflicts(settings)
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    result = api.convert(
        source,
        destination=destination,
        method="early-exit",
        progress=not heard.quiet,
        **settings,
    )
    if as_json or not heard.quiet:
        output.show(result, as_json=as_json)
