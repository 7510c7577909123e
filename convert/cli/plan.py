"""`adaconvert plan METHOD SRC... [options]`: one sub-command for each conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adaconvert.cli import (
    adapting,
    deepening,
    exiting,
    nulling,
    options,
    output,
    splitting,
    versions,
)
from adaconvert.cli.framework import Argument, Command, LazyGroup, Verb
from adaconvert.cli.settings import begin, verbosity_options

METHODS = {
    "upcycle": Verb(
        module="adaconvert.cli.plan",
        attribute="plan_upcycle",
        summary="Plan turning dense checkpoints into a Mixture-of-Experts checkpoint.",
    ),
    "moefy": Verb(
        module="adaconvert.cli.plan",
        attribute="plan_moefy",
        summary="Plan splitting a dense checkpoint's feed-forward networks into experts.",
    ),
    "d2dmoe": Verb(
        module="adaconvert.cli.d2dmoe",
        attribute="plan_d2dmoe",
        summary="Plan splitting feed-forward networks, with routers fitted on text.",
    ),
    "adamoe": Verb(
        module="adaconvert.cli.plan",
        attribute="plan_adamoe",
        summary="Plan null experts beside those of a mixture.",
    ),
    "molora": Verb(
        module="adaconvert.cli.plan",
        attribute="plan_molora",
        summary="Plan a mixture of low-rank adapters beside the linears of a model.",
    ),
    "early-exit": Verb(
        module="adaconvert.cli.plan",
        attribute="plan_early_exit",
        summary="Plan exits after some of a model's blocks.",
    ),
    "depth": Verb(
        module="adaconvert.cli.plan",
        attribute="plan_depth",
        summary="Plan removing whole transformer blocks.",
    ),
}
_RUN_ONLY = ("overwrite", "resume", "verify", "memory", "probe", "allow_nonfinite")


@click.group("plan", cls=LazyGroup, verbs=METHODS)
def plan() -> None:
    """Say what a conversion would do.

    Output size, disk and memory needed, parameters and FLOPs per token before and after, whether
    the result is exact, and which runtimes compute it right. Reads no weights, writes nothing.
    """


@click.command("upcycle", cls=Command)
@options.sources_argument()
@options.upcycle_options()
@options.run_options(hidden=True)
@options.json_option()
@verbosity_options
def plan_upcycle(sources: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Plan `adaconvert upcycle`, with the same arguments.

    A DST that does not exist yet may stand at the end, and options that only matter to the run
    itself are accepted too; neither changes the plan.
    """
    for name in _RUN_ONLY:
        settings.pop(name)
    begin(versions.READING)
    from adaconvert import api

    report = api.plan(*_without_destination(sources), method="upcycle", **settings)
    output.show(report, as_json=as_json)


@click.command("moefy", cls=Command)
@options.source_argument()
@click.argument(
    "destination",
    cls=Argument,
    metavar="[DST]",
    required=False,
    describe="Accepted, so that the arguments of `moefy` can stand; it is not looked at.",
)
@splitting.moefy_options()
@options.run_options(hidden=True)
@options.json_option()
@verbosity_options
def plan_moefy(source: str, destination: str | None, as_json: bool, **settings: Any) -> None:
    """Plan `adaconvert moefy`, with the same arguments.

    Options that only matter to the run itself are accepted too and do not change the plan.
    """
    for name in _RUN_ONLY:
        settings.pop(name)
    begin(versions.READING)
    from adaconvert import api

    output.show(api.plan(source, method="moefy", **settings), as_json=as_json)


@click.command("adamoe", cls=Command)
@options.sources_argument()
@nulling.adamoe_options()
@options.run_options(hidden=True)
@options.json_option()
@verbosity_options
def plan_adamoe(sources: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Plan `adaconvert adamoe`, with the same arguments.

    Says what each token runs at the start, what share of the source's experts the null bias can
    reach, and which runtimes run the result. A DST may stand at the end, and options that only
    matter to the run itself are accepted too; neither changes the plan.
    """
    for name in _RUN_ONLY:
        settings.pop(name)
    begin(versions.READING)
    from adaconvert import api

    report = api.plan(*_without_destination(sources), method="adamoe", **settings)
    output.show(report, as_json=as_json)


@click.command("molora", cls=Command)
@adapting.source_argument()
@click.argument(
    "destination",
    cls=Argument,
    metavar="[DST]",
    required=False,
    describe="Accepted, so that the arguments of `molora` can stand; it is not looked at.",
)
@adapting.molora_options()
@options.run_options(hidden=True)
@options.json_option()
@verbosity_options
def plan_molora(source: str, destination: str | None, as_json: bool, **settings: Any) -> None:
    """Plan `adaconvert molora`, with the same arguments.

    Options that only matter to the run itself are accepted too and do not change the plan.
    """
    for name in _RUN_ONLY:
        settings.pop(name)
    begin(versions.READING)
    from adaconvert import api

    output.show(api.plan(source, method="molora", **settings), as_json=as_json)


@click.command("early-exit", cls=Command)
@options.source_argument()
@click.argument(
    "destination",
    cls=Argument,
    metavar="[DST]",
    required=False,
    describe="Accepted, so that the arguments of `early-exit` can stand; it is not looked at.",
)
@exiting.early_exit_options()
@options.run_options(hidden=True)
@options.json_option()
@verbosity_options
def plan_early_exit(source: str, destination: str | None, as_json: bool, **settings: Any) -> None:
    """Plan `adaconvert early-exit`, with the same arguments.

    Says what exits add to the files, and what share of its tokens a draft must get right to be
    faster than no draft. Options that only matter to the run itself are accepted too and do not
    change the plan.
    """
    for name in _RUN_ONLY:
        settings.pop(name)
    begin(versions.READING)
    from adaconvert import api

    output.show(api.plan(source, method="early-exit", **settings), as_json=as_json)


@click.command("depth", cls=Command)
@options.source_argument()
@click.argument(
    "destination",
    cls=Argument,
    metavar="[DST]",
    required=False,
    describe="Accepted, so that the arguments of `depth` can stand; it is not looked at.",
)
@deepening.depth_options()
@options.run_options(hidden=True)
@options.json_option()
@verbosity_options
def plan_depth(source: str, destination: str | None, as_json: bool, **settings: Any) -> None:
    """Plan `adaconvert depth`, with the same arguments.

    Says which blocks go and what each token costs then; nothing is searched, and evenly spaced
    blocks stand for those a search would find. Options that only matter to the run itself are
    accepted too and do not change the plan.
    """
    for name in _RUN_ONLY:
        settings.pop(name)
    begin(versions.READING)
    from adaconvert import api

    output.show(api.plan(source, method="depth", **settings), as_json=as_json)


def _without_destination(sources: tuple[str, ...]) -> tuple[str, ...]:
    """Return the sources without a last one that is the DST of the same `upcycle` call.

    The last of several is a source only if it is a checkpoint adaconvert did not write, or a hub id
    (org/name where there is no folder org).
    """
    if len(sources) == 1:
        return sources
    last = Path(sources[-1])
    dense = (last / "config.json").exists() and not (last / "adaconvert.json").exists()
    hub_id = sources[-1].count("/") == 1 and not last.is_absolute() and not last.parent.exists()
    return sources if dense or hub_id else sources[:-1]
