"""The options of `molora`, so that `plan molora` and `molora` cannot drift apart."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli.framework import Argument
from adaconvert.cli.options import Decorator, apply, option, storage_but_dtype


def source_argument() -> Decorator[Any]:
    """Return the argument for the model, or for adapters that are written in another form."""
    return click.argument(
        "source",
        cls=Argument,
        metavar="SRC",
        describe="Checkpoint folder, hub-cache snapshot or hub id; or a folder of adapters, to "
        "write them in another form.",
    )


def molora_options() -> Decorator[Any]:
    """Return what decides the result of `molora`: adapters, routing, and what is written."""
    return apply(*_ADAPTERS, *_ROUTING, *_EXISTING, *_FORM, *storage_but_dtype())


_ADAPTERS = (
    option(
        "adapters", "--experts", type=int, metavar="E", help="Adapters of each linear. Default: 8."
    ),
    option("adapters", "--rank", type=int, metavar="R", help="Rank of each. Default: 8."),
    option(
        "adapters",
        "--alpha",
        type=float,
        metavar="A",
        help="Over the rank, what each is multiplied by. Default: 16.",
    ),
    option(
        "adapters",
        "--target-modules",
        metavar="NAMES",
        help="Linears that get adapters: ends of their paths such as q_proj,v_proj, all-linear, or "
        "a regular expression of whole paths. Default: all of the blocks; of ia3 those that give "
        "keys and values, and those that read hidden units.",
    ),
    option(
        "adapters",
        "--experts-kind",
        type=click.Choice(["lora", "ia3"]),
        default="lora",
        help="'lora': low-rank pairs A and B (MoLoRA); 'ia3': vectors that scale (MoV).",
    ),
    option(
        "adapters",
        "--share",
        type=click.Choice(["a"]),
        help="One A for all adapters of a linear (HydraLoRA).",
    ),
    option(
        "adapters",
        "--dropout",
        type=float,
        default=0.0,
        metavar="P",
        help="On the input of adapters, in training.",
    ),
    option("adapters", "--seed", type=int, default=0, metavar="N", help="Of every random choice."),
)
_ROUTING = (
    option(
        "routing",
        "--routing",
        type=click.Choice(["soft", "topk", "topp", "uniform", "arrow", "phatgoose"]),
        default="soft",
        help="How adapters are weighed for a token: softmax of a router, its --k largest, the "
        "fewest that reach --p together, or all alike. 'arrow' and 'phatgoose' route adapters that "
        "exist: by their own directions, or by gates trained on --data.",
    ),
    option(
        "routing",
        "--k",
        type=int,
        metavar="K",
        help="Of topk, arrow and phatgoose. Default: 2, of arrow 3.",
    ),
    option("routing", "--p", type=float, metavar="P", help="Of topp. Default: 0.8."),
    option(
        "routing",
        "--renormalize",
        is_flag=True,
        help="Weights of the chosen ones sum to 1, which MoLoRA's own do not; arrow's and "
        "phatgoose's always do.",
    ),
    option(
        "routing",
        "--router",
        type=click.Choice(["per-module", "per-layer", "shared"]),
        default="per-module",
        help="A router of each linear, on its input; one a block, on the input of the block; or "
        "one for the model, on the input of every block.",
    ),
)
_EXISTING = (
    option(
        "existing adapters",
        "--from",
        "adapters",
        multiple=True,
        metavar="FOLDER",
        help="A LoRA adapter of SRC that becomes an expert; repeat it, in their order.",
    ),
    option(
        "existing adapters",
        "--data",
        multiple=True,
        metavar="FILE|ID",
        help="For phatgoose: a text for each --from, in the same order, on which its gate is "
        "trained.",
    ),
    option(
        "existing adapters",
        "--data-field",
        default="text",
        metavar="NAME",
        help="Field that holds the text.",
    ),
    option(
        "existing adapters",
        "--gate-steps",
        type=int,
        default=100,
        metavar="N",
        help="For phatgoose: training steps of each gate.",
    ),
    option(
        "existing adapters",
        "--subtract-mean",
        is_flag=True,
        help="Take what all adapters have in common off each (GenKnowSub).",
    ),
    option(
        "existing adapters",
        "--device",
        default="auto",
        metavar="NAME",
        help="Where gates are trained. 'auto': the accelerator, if there is one.",
    ),
    option(
        "existing adapters",
        "--work",
        metavar="DIR",
        type=click.Path(file_okay=False),
        help="Keep gates on disk there while they are trained; a killed run goes on from there.",
    ),
)
_FORM = (
    option(
        "result",
        "--standalone",
        is_flag=True,
        help="Write a checkpoint, with the model in it, that needs neither PEFT nor adaconvert to "
        "load.",
    ),
    option(
        "result",
        "--as-plain-lora",
        is_flag=True,
        help="Write the stock LoRA of rank E x R that equals uniform weights.",
    ),
    option(
        "result",
        "--as-moe",
        is_flag=True,
        help="Write a stock mixture whose experts are the feed-forward network plus one adapter "
        "each, for runtimes without adapters.",
    ),
    option(
        "result",
        "--target",
        default="auto",
        metavar="HOST",
        help="With --as-moe: architecture of the mixture, such as mixtral.",
    ),
    option(
        "result",
        "--top-k",
        type=int,
        metavar="K",
        help="With --as-moe: experts per token. Default: --k, or all.",
    ),
    option(
        "result",
        "--base",
        metavar="SRC",
        help="What an adapter folder names as its base, such as org/name. Default: SRC. Where SRC "
        "is an adapter folder, also where its base is.",
    ),
)
