"""`adaconvert`: the table of verbs, and the frame every one of them runs in."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from adaconvert import __version__
from adaconvert.cli import errors, output
from adaconvert.cli.framework import LazyGroup, Verb
from adaconvert.cli.settings import Settings, verbosity_options
from adaconvert.cli.signals import signals_raise

PROGRAM = "adaconvert"
VERBS = {
    "inspect": Verb(
        module="adaconvert.cli.inspect",
        attribute="inspect",
        summary="Say what a checkpoint is: family, size, cost per token, problems.",
    ),
    "plan": Verb(
        module="adaconvert.cli.plan",
        attribute="plan",
        summary="Say what a conversion would do, without reading weights.",
    ),
    "upcycle": Verb(
        module="adaconvert.cli.upcycle",
        attribute="upcycle",
        summary="Turn dense checkpoints into a Mixture-of-Experts checkpoint.",
    ),
    "moefy": Verb(
        module="adaconvert.cli.moefy",
        attribute="moefy",
        summary="Split a dense checkpoint's feed-forward networks into experts.",
    ),
    "d2dmoe": Verb(
        module="adaconvert.cli.d2dmoe",
        attribute="d2dmoe",
        summary="Split feed-forward networks, and train routers that choose among the experts.",
    ),
    "adamoe": Verb(
        module="adaconvert.cli.adamoe",
        attribute="adamoe",
        summary="Let easy tokens run fewer experts, by null experts beside the real ones.",
    ),
    "molora": Verb(
        module="adaconvert.cli.molora",
        attribute="molora",
        summary="Put a mixture of low-rank adapters beside the linears of a model.",
    ),
    "early-exit": Verb(
        module="adaconvert.cli.early_exit",
        attribute="early_exit",
        summary="Give a model exits after some of its blocks, to leave there or to draft with.",
    ),
    "depth": Verb(
        module="adaconvert.cli.depth",
        attribute="depth",
        summary="Remove whole transformer blocks from a model.",
    ),
    "unmoefy": Verb(
        module="adaconvert.cli.unmoefy",
        attribute="unmoefy",
        summary="Put a split checkpoint together again, bit for bit.",
    ),
    "verify": Verb(
        module="adaconvert.cli.verify",
        attribute="verify",
        summary="Prove that a converted checkpoint is whole and computes what it should.",
    ),
    "finetune": Verb(
        module="adaconvert.cli.finetune",
        attribute="finetune",
        summary="Tune a dense, mixture or adaptive checkpoint briefly on text.",
    ),
    "evaluate": Verb(
        module="adaconvert.cli.evaluate",
        attribute="evaluate",
        summary="Say how good a checkpoint is, and what it costs.",
    ),
    "calibrate": Verb(
        module="adaconvert.cli.calibrate",
        attribute="calibrate",
        summary="Measure compute and loss of an adaptive checkpoint, and set its default.",
    ),
    "card": Verb(
        module="adaconvert.cli.card",
        attribute="card",
        summary="Write the model card of a checkpoint anew.",
    ),
    "push": Verb(
        module="adaconvert.cli.push",
        attribute="push",
        summary="Publish a checkpoint at a Hugging Face hub.",
    ),
    "run": Verb(
        module="adaconvert.cli.run",
        attribute="run",
        summary="Run a recipe: convert, tune, measure, publish; go on where it stopped.",
    ),
    "recipes": Verb(
        module="adaconvert.cli.recipes",
        attribute="recipes",
        summary="List, show, copy and check recipes.",
    ),
}


@click.group(
    PROGRAM,
    cls=LazyGroup,
    verbs=VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=(
        "Exit codes: 0 done, 1 bug in adaconvert, 2 usage, 3 bad input checkpoint, 4 output "
        "conflict, 5 verification or training failed, 6 disk, memory, permission or version, 130 "
        "interrupted."
    ),
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@verbosity_options
def cli() -> None:
    """Turn dense Hugging Face checkpoints into Mixture-of-Experts checkpoints.

    Reads a checkpoint folder or hub id, writes a checkpoint folder that stock transformers loads.
    """


def run(arguments: Sequence[str]) -> int:
    """Return the exit code after running one command; what went wrong has been said on stderr."""
    output.prepare_streams()
    settings = Settings()
    try:
        with signals_raise():
            code = _invoke(list(arguments), settings)
            output.flush()
            return code
    except BaseException as error:
        return _ended_by(error, settings)


def _invoke(arguments: list[str], settings: Settings) -> int:
    try:
        with cli.make_context(PROGRAM, arguments, obj=settings) as context:
            cli.invoke(context)
    except click.exceptions.NoArgsIsHelpError as error:
        output.complain(error.format_message())
        return errors.USAGE
    except click.exceptions.Exit as error:
        return error.exit_code
    return 0


def _ended_by(error: BaseException, settings: Settings) -> int:
    if isinstance(error, SystemExit | GeneratorExit):
        raise error
    end = errors.outcome(error)
    try:
        if end.is_bug and settings.verbosity:
            import traceback

            output.complain("".join(traceback.format_exception(error)).rstrip())
        if end.text:
            output.complain(end.text)
        output.flush()
    except BrokenPipeError:
        return errors.PIPE_CLOSED
    finally:
        output.settle_streams()
    return end.code


def main() -> NoReturn:
    """The process ends with the exit code of the command in `sys.argv`."""
    instruction = os.environ.get("_ADACONVERT_COMPLETE")
    if instruction:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(cli, {}, PROGRAM, "_ADACONVERT_COMPLETE", instruction))
    sys.exit(run(sys.argv[1:]))
