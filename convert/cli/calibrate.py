"""`adaconvert calibrate CKPT`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Argument, Command
from adaconvert.cli.options import option
from adaconvert.cli.settings import begin, verbosity_options


def _choice_options() -> options.Decorator[Any]:
    """Return what says which setting becomes the default."""
    return options.apply(
        option(
            "choice",
            "--budget",
            type=float,
            metavar="X",
            help="Choose the least loss within this fraction of the source's FLOPs; nothing "
            "is promised.",
        ),
        option(
            "choice",
            "--max-loss-increase",
            type=float,
            metavar="NATS",
            help="Choose the cheapest setting certified to raise the loss by no more than this.",
        ),
        option(
            "choice",
            "--max-disagreement",
            type=float,
            metavar="SHARE",
            help="Choose the cheapest setting certified to change no more than this share of the "
            "most likely next tokens, or of a classifier's classes.",
        ),
        option(
            "choice",
            "--max-label-error",
            type=float,
            metavar="SHARE",
            help="Of a classifier, on labelled data: choose the cheapest setting certified to be "
            "wrong about no more than this share of the labels.",
        ),
        option(
            "choice",
            "--max-label-error-increase",
            type=float,
            metavar="SHARE",
            help="The same for how much more of them it gets wrong than the whole model does.",
        ),
        option(
            "choice",
            "--confidence",
            type=float,
            default=0.95,
            metavar="P",
            help="Probability, over the draw of the data, that what is certified holds.",
        ),
        option(
            "choice",
            "--clip",
            type=float,
            metavar="NATS",
            help="Clip the rise in loss of a block to this. Default: five times the limit, at "
            "least 0.25.",
        ),
        option(
            "choice",
            "--unit",
            type=click.Choice(["document", "block"]),
            default="document",
            help="What is drawn at random: documents, or blocks of these documents alone (for one "
            "long text).",
        ),
    )


def _sweep_options() -> options.Decorator[Any]:
    """Return what says which settings are tried."""
    return options.apply(
        option(
            "settings",
            "--rule",
            "rules",
            multiple=True,
            type=click.Choice(["top-k", "dynamic-k", "threshold", "top-p", "null"]),
            help="Selection rule to sweep; may be repeated. Default: those that suit the routers; "
            "of null experts their bias, and top-k of the real ones for comparison.",
        ),
        option(
            "settings",
            "--values",
            callback=options.numbers,
            metavar="A,B,...",
            help="Values of the one --rule to try, such as taus, instead of shares of the experts.",
        ),
        option(
            "settings",
            "--per-layer",
            is_flag=True,
            help="Also try giving every layer its own share.",
        ),
        option(
            "settings",
            "--search",
            type=click.Choice(["greedy", "evolve"]),
            default="greedy",
            help="How --per-layer finds shares: by what each layer alone loses, or, at a --budget, "
            "by an evolution (EvoPress) that measures whole models, which takes longer.",
        ),
        *options.evolution_options("settings"),
        option(
            "settings",
            "--knob",
            type=click.Choice(["depth", "experts"]),
            help="What to calibrate of a model with both blocks that tokens skip and experts to "
            "choose; the other stays as configured, and what it saves counts.",
        ),
        option(
            "settings",
            "--measure",
            type=click.Choice(["difference", "max", "entropy", "state", "classifier", "patience"]),
            help="How sure an exit is, of a model with exits. Default: as configured.",
        ),
    )


def _data_options() -> options.Decorator[Any]:
    """Return what says which text is read."""
    return options.apply(
        option(
            "data",
            "--data",
            multiple=True,
            required=True,
            metavar="WHERE",
            help="A .jsonl, .json, .txt or .parquet file, a folder of those, or a hub data set "
            "such as org/name or org/name:config; may be repeated.",
        ),
        option("data", "--field", default="text", metavar="NAME", help="What holds the text."),
        option(
            "data",
            "--label-field",
            metavar="NAME",
            help="What holds the class of a text or image, as a number or by name; the table then "
            "says how many labels are wrong. Default: 'label' with --max-label-error and "
            "--max-label-error-increase, else labels are not read.",
        ),
        option(
            "data",
            "--split",
            metavar="NAME",
            help="Split of a hub data set, or the word that names the files of a folder.",
        ),
        option("data", "--max-documents", type=int, metavar="N", help="Documents to read."),
        option(
            "data",
            "--max-tokens",
            type=int,
            default=100_000,
            metavar="N",
            help="Tokens to calibrate on, spread over as many documents as there are.",
        ),
        option("data", "--length", type=int, default=512, metavar="L", help="Tokens of a block."),
        option(
            "data",
            "--seed",
            type=int,
            default=0,
            metavar="N",
            help="Seed of blocks, splits and --search.",
        ),
    )


def _run_options() -> options.Decorator[Any]:
    """Return how it is run and where the result goes."""
    return options.apply(
        option("run", "--device", metavar="NAME", help="Default: an accelerator if there is one."),
        option(
            "run",
            "--dtype",
            type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
            default="auto",
            help="What to compute in; 'auto' is as stored.",
        ),
        option("run", "--batch-size", type=int, metavar="N", help="Blocks run together."),
        option(
            "output",
            "--out",
            "destination",
            metavar="DST",
            help="Write a calibrated copy there. Default: CKPT itself is updated, all or nothing.",
        ),
        option(
            "output",
            "--overwrite",
            is_flag=True,
            help="Replace a DST that adaconvert wrote; it stays until the new one is complete.",
        ),
    )


@click.command("calibrate", cls=Command)
@click.argument(
    "checkpoint", cls=Argument, metavar="CKPT", describe="Folder of an adaptive checkpoint."
)
@_data_options()
@_choice_options()
@_sweep_options()
@_run_options()
@options.json_option()
@verbosity_options
def calibrate(checkpoint: str, data: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Measure which setting gives which compute and loss, and choose the default.

    The table goes into config.json and the card; `model.set_compute(x)` uses it wherever the
    checkpoint loads. With a --max option the choice is certified (Learn-then-Test) on data that
    took no part in finding it; too little data is refused with the number needed.
    """
    heard = begin(versions.EVALUATING)
    from adaconvert import api

    report = api.calibrate(checkpoint, *data, progress=not heard.quiet, **settings)
    output.show(report, as_json=as_json)
