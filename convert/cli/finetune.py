"""`adaconvert finetune CKPT DST`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.finetune_options import (
    adapter_options,
    budget_options,
    depth_options,
    exit_options,
    first_process_speaks,
    run_options,
)
from adaconvert.cli.framework import Argument, Command
from adaconvert.cli.options import option
from adaconvert.cli.settings import begin, verbosity_options


def _data_options() -> options.Decorator[Any]:
    """Return what is read, and how much of it."""
    return options.apply(
        option(
            "data",
            "--data",
            multiple=True,
            required=True,
            metavar="WHERE[,WEIGHT]",
            help="A .jsonl, .json, .txt or .parquet file, a folder of those, or a hub data set "
            "such as org/name@revision:config; may be repeated. Weights are shares of the "
            "sequences, 1 when not given. Documents follow each other and are cut every --seq-len "
            "tokens; conversations stay whole and only the assistant's turns are learned. "
            "Attention crosses from one to the next in both.",
        ),
        option(
            "data",
            "--data-format",
            type=click.Choice(["auto", "text", "messages"]),
            multiple=True,
            default=("auto",),
            help="'auto' takes whichever of --field and --messages-field there is; once for all "
            "--data, or once for each.",
        ),
        option(
            "data",
            "--data-split",
            multiple=True,
            metavar="NAME",
            help="Split of hub data sets, or a word that names the files of a folder; once for all "
            "--data, or once for each.",
        ),
        option(
            "data",
            "--field",
            "text_field",
            default="text",
            metavar="NAME",
            help="What holds the text.",
        ),
        option(
            "data",
            "--label-field",
            metavar="NAME",
            help="Of a classifier with exits: what holds the class of a text or image, as a number "
            "or by name. Default: 'label'.",
        ),
        option(
            "data",
            "--messages-field",
            default="messages",
            metavar="NAME",
            help="What holds conversations, which the chat template of CKPT renders.",
        ),
        option(
            "data",
            "--streaming",
            is_flag=True,
            help="Read while training, for data larger than memory; rows are shuffled among "
            "--shuffle-buffer.",
        ),
        option(
            "data",
            "--shuffle-buffer",
            type=int,
            default=10_000,
            metavar="N",
            help="Rows in memory with --streaming.",
        ),
        option(
            "data",
            "--cache/--no-cache",
            "cache",
            default=True,
            help="Keep tokens for the next run with the same data, in $ADACONVERT_CACHE, "
            "$HF_HOME/adaconvert or ~/.cache/adaconvert.",
        ),
        option("data", "--tokens", metavar="N", help="Budget, such as 2M or 1.5B."),
        option("data", "--steps", metavar="N", help="Budget in optimiser steps instead."),
        option("data", "--seq-len", type=int, default=512, metavar="L", help="Tokens a sequence."),
        option(
            "data",
            "--seed",
            type=int,
            default=0,
            metavar="N",
            help="Seed of the order of documents and of dropout.",
        ),
    )


def _validation_options() -> options.Decorator[Any]:
    """Return what is held out, and when it is looked at."""
    return options.apply(
        option(
            "validation",
            "--valid",
            multiple=True,
            metavar="WHERE",
            help="Held-out data, as --data; may be repeated. Its loss is measured before and after "
            "training.",
        ),
        option("validation", "--valid-split", metavar="NAME", help="As --data-split, of --valid."),
        option(
            "validation",
            "--valid-tokens",
            default="100k",
            metavar="N",
            help="Tokens of each that are used.",
        ),
        option(
            "validation",
            "--eval-every",
            type=int,
            metavar="N",
            help="Measure after every N steps too.",
        ),
    )


def _training_options() -> options.Decorator[Any]:
    """Return what is trained, and how."""
    return options.apply(
        option(
            "training",
            "--train",
            multiple=True,
            default=("all",),
            metavar="PART",
            help="router, experts, adapters, exits, depth (what lets tokens skip blocks), all, or "
            "a regular expression for names of parameters; may be repeated.",
        ),
        option("training", "--lr", type=float, default=1e-4, metavar="R", help="Learning rate."),
        option("training", "--router-lr", type=float, metavar="R", help="That of routers."),
        option(
            "training",
            "--lr-of",
            multiple=True,
            metavar="PART=R",
            help="That of a part, named as for --train; may be repeated, the last that fits holds.",
        ),
        option(
            "training",
            "--schedule",
            type=click.Choice(["cosine", "linear", "constant"]),
            default="cosine",
            help="How learning rates fall after the warm-up.",
        ),
        option(
            "training",
            "--warmup",
            type=float,
            default=0.05,
            metavar="P",
            help="Share of the steps over which they rise.",
        ),
        option(
            "training", "--weight-decay", type=float, default=0.01, metavar="W", help="AdamW's."
        ),
        option(
            "training",
            "--max-grad-norm",
            type=float,
            default=1.0,
            metavar="G",
            help="Longer gradients are scaled down to this; 0 leaves them.",
        ),
        option("training", "--batch-size", type=int, default=8, metavar="B", help="Sequences."),
        option(
            "training",
            "--accumulate",
            type=int,
            default=1,
            metavar="A",
            help="Batches per optimiser step; the same as one batch A times as large.",
        ),
        option(
            "training",
            "--select",
            metavar="RULE",
            help="Which experts of an adaptive checkpoint run while training, as for evaluate: "
            "rule=top-k,k=24.",
        ),
        option(
            "training",
            "--compute",
            type=float,
            metavar="X",
            help="The same as a fraction of the reference's FLOPs.",
        ),
    )


def _loss_options() -> options.Decorator[Any]:
    """Return what is minimised."""
    return options.apply(
        option("losses", "--lm", type=float, default=1.0, metavar="C", help="Next-token loss."),
        option(
            "losses",
            "--distill",
            type=float,
            default=0.0,
            metavar="C",
            help="Divergence from the teacher's predictions.",
        ),
        option(
            "losses",
            "--distill-hidden",
            type=float,
            default=0.0,
            metavar="C",
            help="Squared distance from its hidden states, relative to their length.",
        ),
        option(
            "losses",
            "--teacher",
            metavar="CKPT",
            help="Default: the checkpoint as it was, without its null experts.",
        ),
        option(
            "losses",
            "--temperature",
            type=float,
            default=1.0,
            metavar="T",
            help="Of the distillation.",
        ),
        option(
            "losses",
            "--activation",
            type=click.Choice(["keep", "relu", "relu2"]),
            default="keep",
            help="Replaces the activation of the feed-forward networks (D2DMoE, stage 1).",
        ),
        option(
            "losses",
            "--activation-ramp",
            type=float,
            default=0.0,
            metavar="P",
            help="Share of the run over which it takes the old one's place; 0: at once.",
        ),
        option(
            "losses",
            "--sparsity",
            type=float,
            default=0.0,
            metavar="C",
            help="Penalty on activations that are not sparse.",
        ),
        option(
            "losses",
            "--sparsity-loss",
            type=click.Choice(["hoyer", "l1"]),
            default="hoyer",
            help="'hoyer': (sum |a|)^2 / sum a^2; 'l1': sum |a|.",
        ),
        option(
            "losses",
            "--sparsity-norm",
            type=click.Choice(["raw", "width"]),
            default="raw",
            help="'raw' as published, or divided by the number of neurons.",
        ),
        option(
            "losses",
            "--sparsity-ramp",
            type=click.Choice(["constant", "linear", "warm-up"]),
            default="warm-up",
            help="How the penalty grows: not, over the whole run, or over its first half.",
        ),
    )


def _router_options() -> options.Decorator[Any]:
    """Return what is done about routers; names and defaults of `train.routing_config.Routing`."""
    return options.apply(
        option(
            "routers",
            "--balance",
            type=float,
            metavar="C",
            help="Loss for an even use of experts, per sequence; of null experts as one group, "
            "towards their budget. Default: config.json's router_aux_loss_coef for the routers of "
            "a mixture, none for others.",
        ),
        option(
            "routers",
            "--balance-kind",
            type=click.Choice(["loss", "bias"]),
            default="loss",
            help="'bias': no loss; a bias that joins the choice moves towards an even load.",
        ),
        option(
            "routers",
            "--balance-rate",
            type=float,
            default=1e-3,
            metavar="U",
            help="How far the bias moves in a step.",
        ),
        option(
            "routers",
            "--z-loss",
            type=float,
            default=0.0,
            metavar="C",
            help="Penalty on large router logits; 1e-3 is usual.",
        ),
        option(
            "routers",
            "--router-regression",
            type=float,
            default=0.0,
            metavar="C",
            help="Keeps contribution routers of adaptive checkpoints true to their experts.",
        ),
        option(
            "routers",
            "--collapse",
            type=float,
            default=0.95,
            metavar="P",
            help="Refuse the result when the busiest experts of a layer get this share of the "
            "choices at the end; 0 never does.",
        ),
    )


@click.command("finetune", cls=Command)
@click.argument(
    "source",
    cls=Argument,
    metavar="CKPT",
    describe="Checkpoint folder or hub id: dense, Mixture-of-Experts or adaptive; or an adapter "
    "folder of PEFT.",
)
@options.destination_argument("Folder to write; must not exist yet, or be empty.")
@_data_options()
@_validation_options()
@_training_options()
@_loss_options()
@_router_options()
@budget_options()
@exit_options()
@depth_options()
@adapter_options()
@run_options()
@verbosity_options
def finetune(source: str, destination: str, as_json: bool, **settings: Any) -> None:
    """Tune a dense, mixture or adaptive checkpoint briefly on text; or, on labelled texts or
    images, a classifier with exits.

    The result is a checkpoint of the same kind, under the same names and in the same dtype; of an
    adapter folder, whose adapters and routers are trained, such a folder. With
    --activation and --sparsity this is stage 1 of D2DMoE: the same command without them gives the
    dense model tuned on the same tokens with the same schedule, to compare with. DST appears whole
    or not at all. On several devices or machines: torchrun -m adaconvert finetune ...
    """
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    with first_process_speaks() as speaks:
        result = api.finetune(
            source,
            destination,
            progress=not heard.quiet,
            report=None if heard.quiet else output.complain,
            **settings,
        )
    if speaks and (as_json or not heard.quiet):
        output.show(result, as_json=as_json)
