"""`adaconvert finetune CKPT DST`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
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
            help="A .jsonl, .json, .txt or .parquet file, a folder of those, or a hub data set; "
            "may be repeated. Weights are shares of the tokens, 1 when not given.",
        ),
        option(
            "data",
            "--field",
            "text_field",
            default="text",
            metavar="NAME",
            help="What holds the text.",
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


def _training_options() -> options.Decorator[Any]:
    """Return what is trained, and how."""
    return options.apply(
        option(
            "training",
            "--train",
            multiple=True,
            default=("all",),
            metavar="PART",
            help="router, experts, adapters, exits, all, or a regular expression for names of "
            "parameters; may be repeated.",
        ),
        option("training", "--lr", type=float, default=1e-4, metavar="R", help="Learning rate."),
        option("training", "--router-lr", type=float, metavar="R", help="That of routers."),
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
        option("losses", "--teacher", metavar="CKPT", help="Default: the checkpoint as it was."),
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


def _run_options() -> options.Decorator[Any]:
    """Return how it runs and where the result goes."""
    return options.apply(
        option(
            "run",
            "--device",
            default="auto",
            metavar="NAME",
            help="cpu, or an accelerator such as cuda; 'auto' takes one if there is one.",
        ),
        option(
            "run",
            "--precision",
            type=click.Choice(["fp32", "bf16"]),
            default="fp32",
            help="'bf16': matrices are multiplied in bfloat16, trained weights stay float32.",
        ),
        option(
            "run",
            "--checkpointing",
            is_flag=True,
            help="Recompute activations going back: less memory, a third more time.",
        ),
        option(
            "run", "--log-every", type=int, default=10, metavar="N", help="Steps between lines."
        ),
        option(
            "run",
            "--save-every",
            type=int,
            metavar="N",
            help="Steps between checkpoints to resume from; 0 for none. Default: five a run.",
        ),
        option(
            "run",
            "--report-to",
            multiple=True,
            metavar="NAME",
            help="Experiment tracker, such as tensorboard; may be repeated.",
        ),
        option(
            "output",
            "--overwrite",
            is_flag=True,
            help="Replace a DST that adaconvert wrote; it stays until the new one is complete.",
        ),
        option(
            "output",
            "--resume",
            is_flag=True,
            help="Go on from the last checkpoint of an interrupted run with the same arguments.",
        ),
        option(
            "output",
            "--dtype",
            type=click.Choice(["keep", "bfloat16", "float16", "float32"]),
            default="keep",
            help="Stored dtype.",
        ),
        option(
            "output",
            "--max-shard-size",
            default="5GB",
            metavar="SIZE",
            help="Largest file, such as 5GB or 500MiB.",
        ),
        options.revision_option(),
        options.json_option(),
    )


@click.command("finetune", cls=Command)
@click.argument(
    "source",
    cls=Argument,
    metavar="CKPT",
    describe="Checkpoint folder or hub id: dense, Mixture-of-Experts or adaptive.",
)
@options.destination_argument("Folder to write; must not exist yet, or be empty.")
@_data_options()
@_training_options()
@_loss_options()
@_run_options()
@verbosity_options
def finetune(source: str, destination: str, as_json: bool, **settings: Any) -> None:
    """Tune a dense, mixture or adaptive checkpoint briefly on text.

    The result is a checkpoint of the same kind, under the same names and in the same dtype. With
    --activation and --sparsity this is stage 1 of D2DMoE: the same command without them gives the
    dense model tuned on the same tokens with the same schedule, to compare with. DST appears whole
    or not at all.
    """
    heard = begin(versions.COMPUTING)
    from adaconvert import api

    result = api.finetune(
        source,
        destination,
        progress=not heard.quiet,
        report=None if heard.quiet else output.complain,
        **settings,
    )
    if as_json or not heard.quiet:
        output.show(result, as_json=as_json)
