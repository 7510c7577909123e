"""`adaconvert verify SRC... DST`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Command
from adaconvert.cli.settings import begin, verbosity_options
from adaconvert.errors import VerificationError


@click.command("verify", cls=Command)
@options.sources_argument()
@options.destination_argument("The converted checkpoint.")
@options.probe_options()
@options.revision_option()
@options.json_option()
@verbosity_options
def verify(sources: tuple[str, ...], destination: str, as_json: bool, **settings: Any) -> None:
    """Prove that a converted checkpoint is whole and computes what it should.

    Integrity: the hash of every file, every tensor accounted for, shapes, NaN. Equivalence: logits
    on probe text against the source, and how tokens are routed. On failure the first layer that
    differs is named and the exit code is 5.
    """
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    try:
        report = api.verify(*sources, destination, progress=not heard.quiet, **settings)
    except VerificationError as error:
        # the report says more than the error: which checks passed, and by how much one failed
        failed = getattr(error, "report", None)
        if failed is not None:
            output.show(failed, as_json=as_json)
        raise
    output.show(report, as_json=as_json)
