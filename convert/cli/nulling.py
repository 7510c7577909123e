"""The options of `adamoe`, so that `plan adamoe` and `adamoe` cannot drift apart."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli.options import Decorator, apply, option, storage_but_dtype


def adamoe_options() -> Decorator[Any]:
    """Return what decides the result of `adamoe`: null experts, budget, what is made first."""
    return apply(*_NULLS, *_BUDGET, *_VIA, *_UPCYCLE, *_MOEFY, *storage_but_dtype())


_NULLS = (
    option(
        "null experts",
        "--null-experts",
        type=int,
        metavar="M",
        help="Null experts a block. Default: as many as real ones, or the least multiple of them "
        "with which a token can do without any.",
    ),
    option(
        "null experts",
        "--top-k",
        type=int,
        metavar="K",
        help="Slots of a token, real and null. Default: those of the exact start, k (1 + M/n).",
    ),
    option(
        "null experts",
        "--null-kind",
        type=click.Choice(["zero", "identity", "constant"]),
        default="zero",
        help="What a chosen null expert adds: nothing, a share of the input, or a learned vector; "
        "the last two start at nothing.",
    ),
    option(
        "null experts",
        "--null-init",
        type=click.Choice(["exact", "bias"]),
        help="'exact': copies of the router's rows; 'bias': rows of zeros and a bias that is to be "
        "lowered. Both start as the source. Default: exact where the source leaves experts out.",
    ),
    option(
        "null experts",
        "--null-weights",
        type=click.Choice(["real", "selected"]),
        help="Whose weights sum to 1: those of the real experts that run (default), or of all that "
        "are selected, which --materialize takes and can write later.",
    ),
    option(
        "null experts",
        "--min-real",
        type=int,
        metavar="N",
        help="Real experts a token runs in any case, 0 or 1. Default: 1, but 0 for budgets below "
        "1/k of a mixture, and for --null-weights selected.",
    ),
    option(
        "null experts",
        "--layers",
        metavar="LIST",
        help="Blocks that get null experts, such as 4-20,22; of a dense model those that become "
        "mixtures.",
    ),
    option(
        "null experts",
        "--materialize",
        is_flag=True,
        help="Write a stock mixture instead whose null experts are experts of zeros: it runs "
        "anywhere and saves nothing. Of SRC with --top-k as it is by default, or of a result with "
        "--null-weights selected.",
    ),
)
_BUDGET = (
    option(
        "budget",
        "--target-compute",
        type=float,
        metavar="SHARE",
        help="Real-expert FLOPs to spend, as a share of the same model without null experts. Kept "
        "for `finetune`, or reached at once on --data.",
    ),
    option(
        "budget",
        "--layer-budget",
        metavar="LIST",
        help="Shares of single blocks, such as 0-4=0.9,5-=0.6; others have --target-compute.",
    ),
    option(
        "budget",
        "--data",
        metavar="FILE|ID",
        help="Text on which null biases are set so that every block spends its share, without "
        "training: a .txt, .jsonl, .json or .parquet file, a folder of them, or a hub data set.",
    ),
    option(
        "budget", "--data-field", default="text", metavar="NAME", help="Field that holds the text."
    ),
    option("budget", "--data-split", metavar="NAME", help="Split of the data to read."),
    option(
        "budget",
        "--data-tokens",
        type=int,
        default=50_000,
        metavar="N",
        help="Tokens of it to run the model on.",
    ),
    option(
        "budget",
        "--device",
        default="auto",
        metavar="NAME",
        help="Where the text runs. 'auto': the accelerator, if there is one.",
    ),
)
_VIA = (
    option(
        "dense source",
        "--via",
        type=click.Choice(["upcycle", "moefy"]),
        help="What makes a mixture of a dense SRC first. Default: upcycle; several SRC are for it.",
    ),
    option(
        "dense source",
        "--target",
        metavar="HOST",
        help="Architecture of that mixture, such as mixtral. Default: one that holds SRC exactly.",
    ),
    option(
        "dense source", "--seed", type=int, default=0, metavar="N", help="Of every random choice."
    ),
)
_UPCYCLE = (
    option(
        "dense source, upcycle",
        "--experts",
        type=int,
        metavar="N",
        help="Routed experts per layer. Default: 8.",
    ),
    option(
        "dense source, upcycle",
        "--base-top-k",
        type=int,
        metavar="K",
        help="Experts per token before there are null ones. Default: 2.",
    ),
    option("dense source, upcycle", "--granularity", type=int, metavar="G", help="As of upcycle."),
    option(
        "dense source, upcycle",
        "--shared-experts",
        type=click.Choice(["none", "neutral", "split"]),
        help="As of upcycle.",
    ),
    option("dense source, upcycle", "--shared-width", type=int, metavar="W", help="As of upcycle."),
    option("dense source, upcycle", "--noise", type=float, metavar="S", help="As of upcycle."),
    option(
        "dense source, upcycle",
        "--drop",
        type=float,
        metavar="P",
        help="Share of each expert's neurons drawn anew; needs training.",
    ),
    option(
        "dense source, upcycle",
        "--drop-index",
        type=click.Choice(["shared", "per-matrix"]),
        help="As of upcycle.",
    ),
    option(
        "dense source, upcycle",
        "--router-init",
        type=click.Choice(["small", "zeros", "orthogonal", "hidden"]),
        help="As of upcycle.",
    ),
    option(
        "dense source, upcycle",
        "--router-prompts",
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False),
        help="As of upcycle.",
    ),
    option("dense source, upcycle", "--base", metavar="SRC|average", help="As of upcycle."),
    option(
        "dense source, upcycle",
        "--dtype",
        type=click.Choice(["keep", "bfloat16", "float16", "float32"]),
        help="As of upcycle.",
    ),
    option(
        "dense source, upcycle", "--aux-loss-coef", type=float, metavar="C", help="As of upcycle."
    ),
)
_MOEFY = (
    option(
        "dense source, moefy",
        "--num-experts",
        type=int,
        metavar="N",
        help="Equal experts per layer, all of which run before there are null ones.",
    ),
    option("dense source, moefy", "--expert-width", type=int, metavar="M", help="As of moefy."),
    option(
        "dense source, moefy",
        "--split",
        type=click.Choice(["balanced-kmeans", "coactivation", "contiguous", "random"]),
        help="As of moefy; coactivation looks at --data.",
    ),
    option(
        "dense source, moefy",
        "--matrices",
        type=click.Choice(["auto", "gate", "up", "gate+up"]),
        help="As of moefy.",
    ),
)
