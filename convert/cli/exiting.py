"""The options of `early-exit`, so that `plan early-exit` and `early-exit` cannot drift apart."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli.options import Decorator, apply, option, storage_but_dtype


def early_exit_options() -> Decorator[Any]:
    """Return what decides the result of `early-exit`: where, what each has, and how to leave."""
    return apply(*_PLACES, *_HEADS, *_LEAVING, *_DRAFTING, *storage_but_dtype())


_PLACES = (
    option(
        "exits",
        "--exits",
        metavar="LIST",
        help="Where: how many blocks have run, such as 8,16; from 1 to one less than there are.",
    ),
    option(
        "exits",
        "--every",
        metavar="L/N|N",
        help="Instead: after every N-th part of the blocks (L/8), or every N blocks (4); none "
        "after the last one.",
    ),
)
_HEADS = (
    option(
        "heads",
        "--head",
        type=click.Choice(["shared", "affine", "norm", "mlp", "layer", "full"]),
        default="mlp",
        help="What each exit has of its own. 'shared': nothing, it leaves through the model's end "
        "(LayerSkip); 'affine': an affine map before that (tuned lens); 'norm': a norm and an "
        "output matrix; 'mlp': these and a branch of its block's feed-forward network (EE-Tuning); "
        "'layer': a norm, an output matrix and a block; 'full': all of it.",
    ),
    option(
        "heads",
        "--tie-heads",
        is_flag=True,
        help="Use the model's output matrix at every exit, which saves vocabulary x hidden numbers "
        "for each.",
    ),
    option(
        "heads",
        "--confidence",
        is_flag=True,
        help="A linear classifier for each exit that learns whether it can be trusted (CALM).",
    ),
    option(
        "heads",
        "--adaptive",
        is_flag=True,
        help="With --head shared: write it for the adaptive runtime, not as a stock checkpoint.",
    ),
)
_LEAVING = (
    option(
        "leaving",
        "--measure",
        type=click.Choice(["difference", "max", "entropy", "state", "classifier", "patience"]),
        default="max",
        help="What says how sure an exit is: its largest probability, the difference of the two "
        "largest, 1 - entropy / log(classes), likeness to the state at the exit before, its "
        "classifier, or how many exits in a row agree.",
    ),
    option(
        "leaving",
        "--threshold",
        type=float,
        metavar="T",
        help="Leave where an exit is surer than this; better set by `adaconvert calibrate`. "
        "Default: never.",
    ),
    option(
        "leaving",
        "--patience",
        type=int,
        metavar="N",
        help="For --measure patience: exits in a row that must agree. Default: all, which is "
        "never.",
    ),
    option(
        "leaving",
        "--decay-length",
        type=int,
        metavar="N",
        help="Let thresholds fall to nine tenths over this many positions (CALM).",
    ),
    option(
        "leaving",
        "--kv",
        type=click.Choice(["recompute", "propagate"]),
        default="recompute",
        help="What later tokens see of blocks a token skipped: exact keys and values, computed "
        "when they are needed, or those of the state it left with (CALM).",
    ),
)
_DRAFTING = (
    option(
        "drafting",
        "--draft-exit",
        type=int,
        metavar="K",
        help="Exit that drafts when text is generated speculatively. Default: the first.",
    ),
    option(
        "drafting",
        "--draft-tokens",
        type=int,
        metavar="N",
        help="Tokens a draft guesses before the whole model checks them. Default: 6.",
    ),
    option(
        "drafting",
        "--draft-threshold",
        type=float,
        metavar="P",
        help="Stop a draft where the probability of its choice is no higher. Default: 0.4.",
    ),
    option(
        "drafting",
        "--draft-vocab",
        metavar="N",
        help="Tokens a draft chooses among, such as 8k, so that it reads that many rows of the "
        "output matrix; the check has all. Default: all.",
    ),
    option(
        "drafting",
        "--draft-data",
        metavar="FILE|ID",
        help="Text whose most frequent tokens these are. Default: the first of the vocabulary.",
    ),
    option(
        "drafting",
        "--draft-data-field",
        default="text",
        metavar="NAME",
        help="Field that holds the text.",
    ),
)
