"""`adaconvert adamoe SRC DST`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import nulling, options, output, versions
from adaconvert.cli.framework import Command
from adaconvert.cli.settings import begin, verbosity_options
from adaconvert.cli.upcycle import refuse_conflicts


@click.command("adamoe", cls=Command)
@options.sources_argument()
@options.destination_argument("Folder to write; must not exist yet, or be empty.")
@nulling.adamoe_options()
@options.run_options()
@options.json_option()
@verbosity_options
def adamoe(sources: tuple[str, ...], destination: str, as_json: bool, **settings: Any) -> None:
    """Give a mixture of experts null experts, so that easy tokens run fewer real ones.

    A token that selects a null expert runs one real expert less. At the start every token runs what
    it runs in the source, so the result computes what the source computes; what spends less, now on
    --data or later by `finetune`, is said before anything is written. Every stock tensor stays as
    it is. A dense SRC becomes a mixture first. DST appears whole or not at all.
    """
    refuse_conflicts(settings)
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    result = api.convert(
        *sources,
        destination=destination,
        method="adamoe",
        progress=not heard.quiet,
        **settings,
    )
    if as_json or not heard.quiet:
        output.show(result, as_json=as_json)
