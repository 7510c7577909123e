"""`adaconvert upcycle SRC... DST`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Command
from adaconvert.cli.settings import begin, verbosity_options


@click.command("upcycle", cls=Command)
@options.sources_argument()
@options.destination_argument("Folder to write; must not exist yet, or be empty.")
@options.upcycle_options()
@options.run_options()
@options.json_option()
@verbosity_options
def upcycle(sources: tuple[str, ...], destination: str, as_json: bool, **settings: Any) -> None:
    """Turn dense checkpoints into a Mixture-of-Experts checkpoint.

    Every expert starts as a copy of the dense FFN, so the result computes what the source computes;
    what gives this up (--noise, --drop, several sources) is said before anything is written. The
    result is a stock architecture and loads without custom code. DST appears whole or not at all.
    """
    refuse_conflicts(settings)
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    result = api.convert(
        *sources,
        destination=destination,
        method="upcycle",
        progress=not heard.quiet,
        **settings,
    )
    if as_json or not heard.quiet:
        output.show(result, as_json=as_json)


def refuse_conflicts(settings: dict[str, Any]) -> None:
    """No option is given that another one makes meaningless.

    Raises:
        click.UsageError: one is.
    """
    for name in ("memory", "probe"):
        if not settings["verify"] and settings[name] is not None:
            raise click.UsageError(f"--{name} does nothing with --no-verify.")
