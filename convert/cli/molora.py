"""`adaconvert molora SRC DST`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import adapting, options, output, versions
from adaconvert.cli.framework import Command
from adaconvert.cli.settings import begin, verbosity_options
from adaconvert.cli.upcycle import refuse_conflicts


@click.command("molora", cls=Command)
@adapting.source_argument()
@options.destination_argument("Folder to write; must not exist yet, or be empty.")
@adapting.molora_options()
@options.run_options()
@options.json_option()
@verbosity_options
def molora(source: str, destination: str, as_json: bool, **settings: Any) -> None:
    """Put a mixture of low-rank experts beside the linears of a model.

    DST is a PEFT adapter folder, a hundredth of the model, which `finetune` trains. New adapters
    add nothing at first, so the result computes what SRC computes. With --from, LoRA adapters that
    exist become the experts. A SRC that has routed adapters is written in another form. DST appears
    whole or not at all.
    """
    refuse_conflicts(settings)
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    result = api.convert(
        source,
        destination=destination,
        method="molora",
        progress=not heard.quiet,
        **settings,
    )
    if as_json or not heard.quiet:
        output.show(result, as_json=as_json)
