"""`adaconvert run RECIPE [SRC] [DST]`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.finetune_options import first_process_speaks
from adaconvert.cli.framework import Argument, Command
from adaconvert.cli.options import option
from adaconvert.cli.settings import begin, verbosity_options


@click.command("run", cls=Command)
@click.argument(
    "recipe",
    cls=Argument,
    metavar="RECIPE",
    describe="Recipe file, or name of a shipped one: see `adaconvert recipes ls`.",
)
@click.argument(
    "source",
    cls=Argument,
    metavar="[SRC]",
    required=False,
    describe="Checkpoint folder or hub id to start from. Default: the recipe's own.",
)
@click.argument(
    "destination",
    cls=Argument,
    metavar="[DST]",
    required=False,
    describe="Folder of the result. Default: named after source and method, in this folder.",
)
@option(
    "recipe",
    "--set",
    "settings",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change a value: data.train=FILE, STAGE.OPTION=VALUE, such as tune.tokens=5M; may be "
    "repeated.",
)
@option(
    "stages",
    "--from",
    "from_stage",
    metavar="STAGE",
    help="Do this stage and those after it again.",
)
@option("stages", "--dry-run", is_flag=True, help="Print the plan with sizes and stop.")
@option(
    "output",
    "--work",
    metavar="FOLDER",
    help="Where the folders of all stages are kept. Default: .NAME.run beside DST.",
)
@option(
    "output",
    "--overwrite",
    is_flag=True,
    help="Replace a DST that adaconvert wrote in another run.",
)
@options.json_option()
@verbosity_options
def run(recipe: str, as_json: bool, **settings: Any) -> None:
    """Run a recipe: the whole plan is printed first, then every stage is done in order.

    Each stage's result is kept, and a stage is done again only when its inputs, its settings or
    adaconvert have changed: after an interruption, run the same command again. DST appears when
    the last checkpoint is complete, with the recipe beside it.
    """
    heard = begin((*versions.COMPUTING, "pyyaml"))
    from adaconvert import api

    with first_process_speaks() as speaks:
        result = api.run(
            recipe,
            progress=not heard.quiet,
            report=output.complain if speaks and not heard.quiet else None,
            **settings,
        )
    if speaks and (as_json or not heard.quiet or settings["dry_run"]):
        output.show(result, as_json=as_json)
