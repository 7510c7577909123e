"""The options of `depth`, so that `plan depth` and `depth` cannot drift apart."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli.options import Decorator, apply, evolution_options, option, storage_but_dtype


def depth_options() -> Decorator[Any]:
    """Return what decides the result of `depth`: which blocks go, and how they are found, which
    blocks tokens may skip, or which share their matrices."""
    return apply(*_BLOCKS, *_ROUTED, *_SHARED, *_SEARCH, *_TEXT, *storage_but_dtype())


_BLOCKS = (
    option(
        "blocks",
        "--kind",
        type=click.Choice(["layer-drop", "skip", "mod", "recursive"]),
        default="layer-drop",
        help="'layer-drop': whole blocks go, and DST is a stock checkpoint. 'skip': each token may "
        "skip blocks, and everyone still attends to it. 'mod': mixture-of-depths, tokens that run "
        "a block attend to one another alone. 'recursive': blocks share their matrices, with a "
        "low-rank residual each.",
    ),
    option(
        "blocks",
        "--drop",
        metavar="LIST",
        help="The blocks, numbered from 0, such as 3,11,17. "
        "Of 'skip': those no token runs; their adapters run instead.",
    ),
    option("blocks", "--keep", type=int, metavar="K", help="Instead: how many blocks stay."),
    option(
        "blocks",
        "--compute",
        type=float,
        metavar="X",
        help="Instead: FLOPs per token as a share of SRC's, such as 0.75; the nearest number of "
        "blocks stays.",
    ),
)
_ROUTED = (
    option(
        "routed blocks",
        "--layers",
        metavar="LIST",
        help="Blocks that tokens may skip, such as 3,5,8-20. Default: all but the first two and "
        "the last, of 'mod' every second of these.",
    ),
    option(
        "routed blocks",
        "--every",
        type=int,
        metavar="N",
        help="Instead: every Nth of those blocks.",
    ),
    option(
        "routed blocks",
        "--capacity",
        type=float,
        default=0.125,
        metavar="C",
        help="Of 'mod': share of a text's tokens that run a block in training.",
    ),
    option(
        "routed blocks",
        "--predictor",
        type=click.Choice(["mlp", "router"]),
        default="router",
        help="Of 'mod': what decides where later tokens are not known: the router at a threshold, "
        "or what a small network adds to it.",
    ),
    option(
        "routed blocks",
        "--gate",
        type=float,
        default=0.2,
        metavar="S",
        help="Of 'mod': a block's change counts up to S more or less, by the router's score; 0: "
        "not.",
    ),
    option(
        "routed blocks",
        "--kv",
        type=click.Choice(["keep", "skip"]),
        default="keep",
        help="Of 'skip': whether tokens that skip a block write its keys and values.",
    ),
    option(
        "routed blocks",
        "--adapter-width",
        type=int,
        default=64,
        metavar="R",
        help="Of 'skip': width of what tokens that skip run instead; 0: nothing.",
    ),
    option(
        "routed blocks",
        "--router-width",
        type=int,
        default=0,
        metavar="W",
        help="Of 'skip': width of the router's inner layer; 0: a linear router.",
    ),
)
_SHARED = (
    option(
        "shared blocks",
        "--loops",
        type=int,
        metavar="B",
        help="Of 'recursive': how often each shared block runs; it divides the blocks that share.",
    ),
    option(
        "shared blocks",
        "--sharing",
        type=click.Choice(["cycle", "sequence", "middle-cycle", "middle-sequence"]),
        default="cycle",
        help="Which depths share a block. 'cycle': the shared ones run one after the other, B "
        "times; 'sequence': each runs B times, then the next; 'middle-': the first and the last "
        "block stay as they are.",
    ),
    option(
        "shared blocks",
        "--start",
        type=click.Choice(["average", "stepwise", "lower", "upper"]),
        default="average",
        help="What shared matrices begin as: the mean of their depths, or one depth each: evenly "
        "spaced ones, the first, the last.",
    ),
    option(
        "shared blocks",
        "--rank",
        default="64",
        metavar="R",
        help="Of the residual every depth has beside each shared matrix; 'full' gives back SRC, 0 "
        "leaves residuals out.",
    ),
)
_SEARCH = (
    option(
        "search",
        "--search",
        type=click.Choice(["even", "greedy", "evolve"]),
        default="even",
        help="Which blocks go where their number alone is said, never the first or the last. "
        "'even': evenly spaced ones; 'greedy': one after the other, each the one that changes the "
        "model least on --data; 'evolve': evolution at that number (EvoPress).",
    ),
    option(
        "search",
        "--fitness",
        type=click.Choice(["kl", "loss"]),
        default="kl",
        help="What a search makes small: the divergence from SRC's next-token distributions, or "
        "the loss.",
    ),
    *evolution_options("search"),
    option("search", "--seed", type=int, default=0, metavar="N", help="Of everything random."),
    option(
        "search",
        "--device",
        default="auto",
        metavar="NAME",
        help="Where the model runs. 'auto': the accelerator if there is one.",
    ),
)
_TEXT = (
    option(
        "text",
        "--data",
        metavar="FILE|ID",
        help="Text for a search: a .txt, .jsonl, .json or .parquet file, a folder of them, or a "
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
        default=8192,
        metavar="N",
        help="Tokens of it to search on.",
    ),
    option(
        "text",
        "--data-length",
        type=int,
        default=512,
        metavar="L",
        help="Tokens of a sequence.",
    ),
)
