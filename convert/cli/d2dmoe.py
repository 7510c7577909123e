"""`adaconvert d2dmoe SRC DST`, and `adaconvert plan d2dmoe SRC`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Argument, Command
from adaconvert.cli.options import option
from adaconvert.cli.settings import begin, verbosity_options
from adaconvert.cli.upcycle import refuse_conflicts

_RUN_ONLY = ("overwrite", "resume", "verify", "memory", "probe", "allow_nonfinite")


def d2dmoe_options() -> options.Decorator[Any]:
    """Return what decides the result of `d2dmoe`: stages, split, routers, text, how stored."""
    return options.apply(*_STAGES, *_SPLIT, *_ROUTERS, *_TEXT, *options.plain_storage())


_STAGES = (
    option(
        "stages",
        "--stages",
        default="2,3,4",
        metavar="LIST",
        help="2: split into experts; 3: fit routers; 4: select with tau. A checkpoint that is "
        "split already takes 3, 4 or 3,4.",
    ),
)
_SPLIT = (
    option(
        "split",
        "--num-experts",
        type=int,
        metavar="N",
        help="Equal experts per layer. Default: as --expert-width says.",
    ),
    option(
        "split",
        "--expert-width",
        type=int,
        metavar="M",
        help="Neurons of an expert; 1 is the finest. Default: 32, or less where that divides.",
    ),
    option("split", "--layers", metavar="LIST", help="Layers to convert, such as 4-20,22."),
    option(
        "split", "--seed", type=int, default=0, metavar="N", help="Seed of every random choice."
    ),
)
_ROUTERS = (
    option(
        "routers",
        "--tau",
        type=float,
        metavar="T",
        help="Experts run whose score is at least T times the token's highest (the paper's tau; "
        "the published code states 1 - T). Default: 0, every expert.",
    ),
    option(
        "routers",
        "--router-width",
        type=int,
        metavar="W",
        help="Hidden units of a router. Default: 128, for hidden sizes above 1536 512.",
    ),
    option(
        "routers",
        "--router-steps",
        type=int,
        default=1000,
        metavar="N",
        help="Training steps of each layer's router.",
    ),
    option(
        "routers",
        "--router-batch",
        type=int,
        default=256,
        metavar="N",
        help="Tokens of a training step.",
    ),
    option(
        "routers",
        "--router-lr",
        type=float,
        default=3e-3,
        metavar="R",
        help="Peak learning rate.",
    ),
    option(
        "routers",
        "--router-loss",
        type=click.Choice(["relative", "mse"]),
        default="relative",
        help="Squared error relative to the size of a token's contributions, or as it is (the "
        "paper).",
    ),
    option(
        "routers",
        "--device",
        default="auto",
        metavar="NAME",
        help="Where layers run and routers are trained. 'auto': the accelerator if there is one.",
    ),
    option(
        "routers",
        "--work",
        metavar="DIR",
        type=click.Path(file_okay=False),
        help="Keep hidden states on disk there; a killed run goes on from its last layer.",
    ),
)
_TEXT = (
    option(
        "text",
        "--data",
        metavar="FILE|ID",
        help="Text for stage 3: a .txt, .jsonl, .json or .parquet file, a folder of them, or a "
        "hub data set.",
    ),
    option(
        "text", "--data-field", default="text", metavar="NAME", help="Field that holds the text."
    ),
    option("text", "--data-split", metavar="NAME", help="Split of the data to read."),
    option(
        "text",
        "--data-tokens",
        type=int,
        default=32768,
        metavar="N",
        help="Tokens of it to fit routers on.",
    ),
)


@click.command("d2dmoe", cls=Command)
@options.source_argument()
@options.destination_argument("Folder to write; must not exist yet, or be empty.")
@d2dmoe_options()
@options.run_options()
@options.json_option()
@verbosity_options
def d2dmoe(source: str, destination: str, as_json: bool, **settings: Any) -> None:
    """Split feed-forward networks into experts that trained routers choose from.

    Each layer's router learns, on --data, how much every expert adds to a token; --tau then decides
    how many run. No weight of the model is trained: stage 1 of the method, which makes activations
    sparse, is not part of this command, and models without exact zeros (SiLU, GELU) lose quality
    soon as experts are left out. `adaconvert inspect --activations` says how soon.
    """
    refuse_conflicts(settings)
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    result = api.d2dmoe(source, destination, progress=not heard.quiet, **settings)
    if as_json or not heard.quiet:
        output.show(result, as_json=as_json)


@click.command("d2dmoe", cls=Command)
@options.source_argument()
@click.argument(
    "destination",
    cls=Argument,
    metavar="[DST]",
    required=False,
    describe="Accepted, so that the arguments of `d2dmoe` can stand; it is not looked at.",
)
@d2dmoe_options()
@options.run_options(hidden=True)
@options.json_option()
@verbosity_options
def plan_d2dmoe(source: str, destination: str | None, as_json: bool, **settings: Any) -> None:
    """Plan `adaconvert d2dmoe`, with the same arguments.

    Options that only matter to the run itself are accepted too and do not change the plan.
    """
    for name in _RUN_ONLY:
        settings.pop(name)
    begin(versions.READING)
    from adaconvert import api

    output.show(api.plan(source, method="d2dmoe", **settings), as_json=as_json)
