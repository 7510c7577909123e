"""Options of `adaconvert finetune` for adapters, memory and processes, and who reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from adaconvert.cli import options
from adaconvert.cli.options import option
from adaconvert.errors import AdaconvertError


@contextmanager
def first_process_speaks() -> Iterator[bool]:
    """Yield whether this is the first of torchrun's processes, which says why any of them failed;
    the others end with the same exit code and say nothing."""
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        yield is_first
    except AdaconvertError as error:
        if is_first:
            raise
        raise click.exceptions.Exit(error.exit_code) from None


def adapter_options() -> options.Decorator[Any]:
    """Return what is trained in place of matrices; fields of `train.adapt_config.Adapting`."""
    return options.apply(
        option(
            "adapters",
            "--lora",
            type=int,
            default=0,
            metavar="R",
            help="Train low-rank adapters of rank R on frozen matrices, and whatever else --train "
            "names; the result holds their sums.",
        ),
        option(
            "adapters",
            "--lora-alpha",
            type=float,
            metavar="A",
            help="The product of an adapter is multiplied by A / R. Default: R.",
        ),
        option(
            "adapters",
            "--lora-targets",
            multiple=True,
            default=("all",),
            metavar="PART",
            help="experts, attention, all (every matrix inside the blocks but routers), or a "
            "regular expression for names of matrices; may be repeated.",
        ),
        option(
            "adapters",
            "--load-in-4bit",
            "load_in_4bit",
            is_flag=True,
            help="Hold the frozen matrices in 4 bits while training (bitsandbytes); the adapters "
            "are added to the matrices of CKPT itself.",
        ),
    )


def budget_options() -> options.Decorator[Any]:
    """Return what null experts leave of the others; fields of `train.routing_config.Routing`."""
    return options.apply(
        option(
            "null experts",
            "--target-compute",
            type=float,
            metavar="X",
            help="Share of its experts a token is to run, in the mean: 0.7 of those it runs in the "
            "model without null experts. Default: what CKPT states, if it does.",
        ),
        option(
            "null experts",
            "--layer-budget",
            metavar="LAYERS=X",
            help="Other shares of some layers, such as 0-4=0.9,5-=0.6.",
        ),
        option(
            "null experts",
            "--compute-ramp",
            type=float,
            metavar="P",
            help="Share of the run over which budgets come down from what is spent at first; 0: at "
            "once. Default: 0.5.",
        ),
        option(
            "null experts",
            "--null-rate",
            type=float,
            default=0.2,
            metavar="R",
            help="How fast the null biases follow after every step; 0: nothing holds the budget "
            "but --balance, and the losses train the biases.",
        ),
    )


def exit_options() -> options.Decorator[Any]:
    """Return how early exits learn; fields of `train.exit_config.Exiting`."""
    return options.apply(
        option(
            "exits",
            "--exit-loss",
            type=click.Choice(["ce", "kd", "both"]),
            default="ce",
            help="Of the heads of early exits: 'ce': next tokens; 'kd': divergence from what the "
            "last layer predicts; or their sum. --train exits trains them alone.",
        ),
        option(
            "exits",
            "--exit-weights",
            metavar="W",
            help="Factors of their losses: uniform (1 each), linear (share of the blocks before "
            "it), or a number for each such as 0.1,0.2; 0 leaves exits out. Default: uniform with "
            "--train exits, 0.4 times linear where the blocks learn too.",
        ),
        option(
            "exits",
            "--exit-layers",
            metavar="K,...",
            help="Exits that learn, by the blocks before them. Default: all.",
        ),
        option(
            "exits",
            "--exit-chunk",
            type=int,
            default=256,
            metavar="N",
            help="Positions whose logits are in memory at a time.",
        ),
        option(
            "exits",
            "--early-exit-loss",
            type=float,
            default=0.0,
            metavar="SCALE",
            help="LayerSkip: every block exits through the model's own head, and all learn "
            "together; for shared heads and for stock checkpoints, which stay stock. 0.1 to 1.",
        ),
        option(
            "exits",
            "--layer-dropout",
            type=float,
            default=0.0,
            metavar="P",
            help="LayerSkip: leave the last block out of a sequence with this probability, earlier "
            "ones with less. 0.1 is usual.",
        ),
        option(
            "exits",
            "--exit-curriculum",
            default="none",
            metavar="NAME",
            help="LayerSkip: which exits count at a step: none (all), rotational:R (every R-th, "
            "another one each step), gradual (from the last one down).",
        ),
        option(
            "exits",
            "--exit-objective",
            type=click.Choice(["weighted", "geometric", "ponder"]),
            help="Of a classifier: mean of all exits' losses, weights proportional to the blocks "
            "before each (PABEE); or with classifiers of confidence that learn when to halt: at "
            "the exit that does best (Depth-Adaptive Transformer), or as the expected loss asks "
            "(PonderNet). Default: weighted.",
        ),
        option(
            "exits",
            "--objective-factor",
            type=float,
            metavar="C",
            help="Of the loss that teaches geometric and ponder when to halt. Default: 0.01.",
        ),
        option(
            "exits",
            "--halting-prior",
            type=float,
            metavar="P",
            help="Of ponder: chance of halting at each exit in the prior. Default: 0.3.",
        ),
        option(
            "exits",
            "--halting-cost",
            type=float,
            metavar="NATS",
            help="Of geometric: what each further exit must gain. Default: 0.05.",
        ),
    )


def depth_options() -> options.Decorator[Any]:
    """Return how blocks that tokens may skip learn; fields of `train.depth_config.Depthing`."""
    return options.apply(
        option(
            "routed blocks",
            "--depth-compute",
            type=float,
            metavar="X",
            help="FLOPs per token that blocks which tokens may skip are to leave, as a fraction of "
            "the dense model's. Default: mixture-of-depths goes to its --capacity, others stay at "
            "their thresholds.",
        ),
        option(
            "routed blocks",
            "--depth-ramp",
            type=float,
            metavar="SHARE",
            help="Share of the run over which skipping grows from what it is to that. Default: 0 "
            "where routers were fitted, else 0.5.",
        ),
        option(
            "routed blocks",
            "--predictor-loss",
            type=float,
            metavar="C",
            help="Factor of the loss by which the causal predictor of mixture-of-depths learns "
            "which tokens are the best of a text; it moves nothing else. Default: 1, and 0 for "
            "--predictor router.",
        ),
        option(
            "routed blocks",
            "--adapter-loss",
            type=float,
            default=1.0,
            metavar="C",
            help="Factor of the loss by which what skipped tokens run instead learns what the "
            "block does; it moves nothing else.",
        ),
        option(
            "routed blocks",
            "--depth-fit",
            type=int,
            default=8192,
            metavar="N",
            help="Tokens of the run on which what skipped tokens run instead, and with "
            "--depth-compute the routers, are fitted by least squares before the first step, where "
            "they say nothing yet; 0: not.",
        ),
    )


def run_options() -> options.Decorator[Any]:
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
            type=click.Choice(["auto", "fp32", "bf16", "fp64"]),
            default="auto",
            help="'bf16': matrices are multiplied in bfloat16, trained weights stay float32, "
            "frozen ones as stored; 'auto': that where weights stored in 16 bits stay frozen, else "
            "fp32; 'fp64': for comparisons.",
        ),
        option(
            "run",
            "--optimizer",
            type=click.Choice(["adamw", "sgd"]),
            default="adamw",
            help="'sgd': without momentum, so nothing is kept per weight.",
        ),
        option(
            "run",
            "--checkpointing",
            is_flag=True,
            help="Recompute activations going back: less memory, a third more time.",
        ),
        option(
            "run",
            "--memory",
            metavar="SIZE",
            help="Memory training may take, such as 20GB. Default: what is free. More is refused "
            "before anything is read, with settings that fit.",
        ),
        option("run", "--compile", is_flag=True, help="Run through torch.compile."),
        option(
            "run",
            "--fsdp",
            is_flag=True,
            help="Split weights, gradients and optimiser state over the processes of torchrun.",
        ),
        option(
            "run",
            "--expert-parallel",
            type=int,
            default=1,
            metavar="N",
            help="N processes share the experts of each layer of a stock mixture between them; "
            "the rest is split as by --fsdp.",
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
            "run",
            "--log-dir",
            type=click.Path(file_okay=False),
            metavar="FOLDER",
            help="Where its files go. Default: DST.logs, beside DST.",
        ),
        option(
            "run",
            "--dry-run",
            is_flag=True,
            help="Say what would be trained and what memory it needs; write nothing.",
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
        options.base_option(),
        options.revision_option(),
        options.json_option(),
    )
