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
    own = (*_STAGES, *_TUNING, *_SPLIT, *_ROUTERS, *_PROJECTIONS, *_TEXT)
    return options.apply(*own, *options.plain_storage())


_STAGES = (
    option(
        "stages",
        "--stages",
        default="2,3,4",
        metavar="LIST",
        help="1: train the model to be sparse; 2: split into experts; 3: fit routers; 4: select "
        "with tau; 5: replace attention projections. A checkpoint that is split already takes 3, 4 "
        "and 5; a dense one may take 5 alone.",
    ),
)
#: as in `finetune`, which says what each means.
_TUNING = (
    option("stage 1", "--tokens", metavar="N", help="Budget, such as 20M; stage 1 needs one."),
    option(
        "stage 1",
        "--activation",
        type=click.Choice(["keep", "relu", "relu2"]),
        help="Replaces the activation of the feed-forward networks. Default: relu.",
    ),
    option(
        "stage 1",
        "--activation-ramp",
        type=float,
        metavar="P",
        help="Share of stage 1 over which it takes the old one's place. Default: 0, at once.",
    ),
    option(
        "stage 1",
        "--sparsity",
        type=float,
        metavar="C",
        help="Penalty on activations that are not sparse (raw square Hoyer). Default: 0.0001.",
    ),
    option(
        "stage 1",
        "--distill",
        type=float,
        metavar="C",
        help="Divergence from the predictions of the model as it was. Default: 0.",
    ),
    option("stage 1", "--lr", type=float, metavar="R", help="Peak learning rate. Default: 0.0001."),
    option("stage 1", "--seq-len", type=int, metavar="L", help="Default: 512."),
    option("stage 1", "--batch-size", type=int, metavar="B", help="Sequences. Default: 8."),
    option("stage 1", "--accumulate", type=int, metavar="A", help="Batches a step. Default: 1."),
    option(
        "stage 1",
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        help="Of matrix products. Default: fp32.",
    ),
    option(
        "stage 1",
        "--checkpointing",
        is_flag=True,
        default=None,
        help="Recompute activations going back: less memory, a third more time.",
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
_PROJECTIONS = (
    option(
        "stage 5",
        "--projections",
        metavar="LIST",
        help="Which to replace by networks of as many FLOPs. Default: q,k,v,o.",
    ),
    option(
        "stage 5",
        "--projection-experts",
        type=int,
        default=8,
        metavar="N",
        help="Experts of each; 1 leaves it whole.",
    ),
    option(
        "stage 5",
        "--projection-router-width",
        type=int,
        metavar="W",
        help="Hidden units of their routers. Default: a tenth of the projection's FLOPs.",
    ),
    option(
        "stage 5",
        "--projection-steps",
        type=int,
        default=1000,
        metavar="N",
        help="Training steps of each network.",
    ),
    option(
        "stage 5",
        "--projection-batch",
        type=int,
        default=512,
        metavar="N",
        help="Tokens of a training step.",
    ),
    option(
        "stage 5",
        "--projection-lr",
        type=float,
        default=3e-3,
        metavar="R",
        help="Peak learning rate.",
    ),
    option(
        "stage 5",
        "--projection-sparsity",
        type=float,
        default=1e-4,
        metavar="C",
        help="Penalty on hidden units that are not sparse (raw square Hoyer).",
    ),
)
_TEXT = (
    option(
        "text",
        "--data",
        metavar="FILE|ID",
        help="Text for stages 1, 3 and 5: a .txt, .jsonl, .json or .parquet file, a folder of "
        "them, or a hub data set.",
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
    how many run. Stage 1 trains the model itself, on the same text, so that few of its activations
    matter; without it no weight is trained, and models without exact zeros (SiLU, GELU) lose
    quality soon as experts are left out. `adaconvert inspect --activations` says how soon.

    Stage 5 trains two-layer networks to do what attention projections do, and splits them likewise.
    It is never exact, and the matrices are not kept.
    """
    refuse_conflicts(settings)
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    result = api.d2dmoe(
        source,
        destination,
        progress=not heard.quiet,
        report=None if heard.quiet else output.complain,
        **settings,
    )
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
