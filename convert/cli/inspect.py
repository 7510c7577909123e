"""`adaconvert inspect SRC`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Argument, Command
from adaconvert.cli.options import option
from adaconvert.cli.settings import begin, verbosity_options


@click.command("inspect", cls=Command)
@click.argument(
    "source",
    cls=Argument,
    metavar="SRC",
    describe="Checkpoint folder, hub-cache snapshot, or hub id such as org/name.",
)
@option(
    "activations",
    "--activations",
    is_flag=True,
    help="Run the model on --data and say how sparse its feed-forward networks are.",
)
@option(
    "activations",
    "--data",
    metavar="FILE|ID",
    help="Text: a .txt, .jsonl, .json or .parquet file, a folder of them, or a hub data set.",
)
@option(
    "activations", "--data-field", default="text", metavar="NAME", help="Field that holds the text."
)
@option("activations", "--data-split", metavar="NAME", help="Split of the data to read.")
@option(
    "activations",
    "--data-tokens",
    type=int,
    default=4096,
    metavar="N",
    help="Tokens of it to run the model on.",
)
@options.base_option()
@options.revision_option()
@options.json_option()
@verbosity_options
def inspect(
    source: str,
    revision: str | None,
    base: str | None,
    activations: bool,
    as_json: bool,
    **text: Any,
) -> None:
    """Say what a checkpoint is.

    Family, parameters in all and per token, FLOPs and weight bytes per token, dtype, ties and
    problems. Reads headers, not weights. With --activations: how many hidden units of each layer
    are zero or small on a text, and what that means for splitting it into experts.
    """
    if activations != (text["data"] is not None):
        raise click.UsageError("--activations and --data go together.")
    if activations and revision is not None:
        raise click.UsageError("--revision does nothing with --activations.")
    if activations and base is not None:
        raise click.UsageError("--base does nothing with --activations.")
    heard = begin(versions.COMPUTING if activations else versions.READING)
    from adaconvert import api

    if not activations:
        output.show(api.inspect(source, revision=revision, base=base), as_json=as_json)
        return
    report = api.inspect_activations(
        source,
        text["data"],
        field=text["data_field"],
        split=text["data_split"],
        max_tokens=text["data_tokens"],
        progress=not heard.quiet,
    )
    output.show(report, as_json=as_json)
