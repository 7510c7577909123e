"""The options of `moefy`, so that `plan moefy` and `moefy` cannot drift apart."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli.options import Decorator, apply, option, plain_storage


def moefy_options() -> Decorator[Any]:
    """Return what decides the result of `moefy`: the split, the router, what runs, how stored."""
    return apply(*_SPLIT, *_CHOICE, *_TEXT, *_NATIVE, *plain_storage())


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
    option(
        "split",
        "--split",
        type=click.Choice(
            ["balanced-kmeans", "coactivation", "contiguous", "random", "shared+routed"]
        ),
        default="balanced-kmeans",
        help="How neurons are grouped: by their weights, by being active together on --data, or "
        "with the most active ones always on (CMoE).",
    ),
    option(
        "split",
        "--matrices",
        type=click.Choice(["auto", "gate", "up", "gate+up"]),
        default="auto",
        help="Whose weights balanced-kmeans compares; 'auto': the matrix before the activation.",
    ),
    option(
        "split",
        "--shared-neurons",
        type=int,
        metavar="S",
        help="Neurons that always run, for --split shared+routed. Default: about an eighth.",
    ),
    option("split", "--layers", metavar="LIST", help="Layers to split, such as 4-20,22."),
    option(
        "split", "--seed", type=int, default=0, metavar="N", help="Seed of every random choice."
    ),
)
_CHOICE = (
    option(
        "routing",
        "--router",
        type=click.Choice(["param-center", "similarity", "analytic", "gate", "oracle"]),
        default="param-center",
        help="What scores experts, untrained. 'gate': the model's own gate, run in full; 'oracle': "
        "the whole network, for measuring only.",
    ),
    option(
        "routing",
        "--rule",
        type=click.Choice(["top-k", "dynamic-k", "threshold", "top-p"]),
        default="top-k",
        help="Which experts run. Without a number for the rule, all of them do.",
    ),
    option("routing", "--top-k", type=int, metavar="K", help="For top-k: experts per token."),
    option(
        "routing",
        "--tau",
        type=float,
        metavar="T",
        help="For dynamic-k: experts whose score is at least T times the token's highest.",
    ),
    option(
        "routing",
        "--threshold",
        type=float,
        metavar="X",
        help="For threshold: experts whose score is at least X.",
    ),
    option(
        "routing",
        "--keep",
        type=float,
        metavar="SHARE",
        help="For threshold: find each layer's, so that this share of experts runs on --data.",
    ),
    option(
        "routing",
        "--top-p",
        type=float,
        metavar="P",
        help="For top-p: the best experts that make up P of the token's scores.",
    ),
)
_TEXT = (
    option(
        "text",
        "--data",
        metavar="FILE|ID",
        help="Text for --split coactivation and shared+routed and for --keep: a .txt, .jsonl, "
        ".json or .parquet file, a folder of them, or a hub data set.",
    ),
    option(
        "text", "--data-field", default="text", metavar="NAME", help="Field that holds the text."
    ),
    option("text", "--data-split", metavar="NAME", help="Split of the data to read."),
    option(
        "text",
        "--data-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="Tokens of it to run the model on.",
    ),
)
_NATIVE = (
    option(
        "output",
        "--native",
        is_flag=True,
        help="Write a stock mixture in which every expert runs, as a start for training.",
    ),
    option(
        "output",
        "--target",
        default="auto",
        metavar="HOST",
        help="With --native: architecture of the result, such as mixtral.",
    ),
)
