"""`adaconvert push CKPT ORG/NAME`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Argument, Command
from adaconvert.cli.options import option
from adaconvert.cli.settings import begin, verbosity_options
from adaconvert.errors import OptionError


def _refuse_token(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Return only when no token was given; what was given is not repeated."""
    if value is not None:
        raise OptionError(
            "a token on the command line can be read by everybody on this machine",
            where="--token",
            hint="Log in with `hf auth login`, or set HF_TOKEN; and replace this token by a new "
            "one.",
        )


@click.command("push", cls=Command)
@click.argument(
    "folder", cls=Argument, metavar="CKPT", describe="Checkpoint folder adaconvert wrote."
)
@click.argument(
    "repo",
    cls=Argument,
    metavar="ORG/NAME",
    describe="Repository at the hub; made when it does not exist.",
)
@option(
    "repository",
    "--private/--public",
    default=None,
    help="Who shall see it. Refused where it exists and differs. Default: as it is; a new one as "
    "its owner has set.",
)
@option(
    "repository", "--revision", metavar="BRANCH", help="Branch to commit to; made when missing."
)
@option(
    "repository", "--create-pr", is_flag=True, help="Open a pull request instead of committing."
)
@option("repository", "--commit-message", metavar="TEXT", help="Title of the commit.")
@option(
    "checks",
    "--verify",
    type=click.Choice(["full", "quick"]),
    default="full",
    help="Hash all files before anything is sent, or of the weights only sizes and headers.",
)
@option(
    "checks",
    "--allow-unverified",
    is_flag=True,
    help="Publish a checkpoint that was written with --no-verify.",
)
@option(
    "other",
    "--dry-run",
    is_flag=True,
    help="Check, list every file and what is left out; talk to no hub.",
)
@option("other", "--token", hidden=True, expose_value=False, callback=_refuse_token)
@options.json_option()
@verbosity_options
def push(folder: str, repo: str, as_json: bool, **settings: Any) -> None:
    """Publish a checkpoint at a Hugging Face hub, in one commit.

    Only files adaconvert recorded go there: weights, config, tokenizer, card, manifest, and the
    code of adaptive models. They are checked against the manifest, and searched for access tokens
    and paths of this machine. Log in with `hf auth login` or set HF_TOKEN; HF_ENDPOINT names
    another hub. After an interruption, run it again: what has arrived is not sent twice.
    """
    heard = begin(versions.PUBLISHING)
    from adaconvert import api

    result = api.push(
        folder,
        repo,
        progress=not heard.quiet,
        report=None if heard.quiet or as_json else output.complain,
        **settings,
    )
    output.show(result, as_json=as_json)
