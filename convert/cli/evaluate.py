"""`adaconvert evaluate CKPT`."""

from __future__ import annotations

from typing import Any

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Argument, Command
from adaconvert.cli.options import option
from adaconvert.cli.settings import begin, verbosity_options


def _names(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Return names separated by commas, from an option that may be repeated."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def data_options() -> options.Decorator[Any]:
    """Return what says which text is read."""
    return options.apply(
        option(
            "data",
            "--data",
            metavar="WHERE",
            help="A .jsonl, .json, .txt or .parquet file, a folder of those, or a hub data set "
            "such as org/name or org/name:config.",
        ),
        option("data", "--field", default="text", metavar="NAME", help="What holds the text."),
        option(
            "data",
            "--label-field",
            default="label",
            metavar="NAME",
            help="What holds the class of a text, as a number or by name; for classifiers.",
        ),
        option(
            "data",
            "--split",
            metavar="NAME",
            help="Split of a hub data set, or the word that names the files of a folder.",
        ),
        option("data", "--max-documents", type=int, metavar="N", help="Documents to read."),
        option("data", "--max-tokens", type=int, metavar="N", help="Tokens to stop after."),
        option("data", "--length", type=int, default=512, metavar="L", help="Tokens of a block."),
        option(
            "data",
            "--seed",
            type=int,
            default=0,
            metavar="N",
            help="Seed of the order of documents, which decides what --max-tokens leaves.",
        ),
    )


@click.command("evaluate", cls=Command)
@click.argument(
    "checkpoint",
    cls=Argument,
    metavar="CKPT",
    describe="Checkpoint folder or hub id: adaptive, Mixture-of-Experts or dense; or an adapter "
    "folder of PEFT.",
)
@data_options()
@option(
    "settings",
    "--set-compute",
    callback=options.numbers,
    metavar="A,B,...",
    help="Repeat everything at these fractions of the reference's FLOPs.",
)
@option(
    "settings",
    "--select",
    multiple=True,
    metavar="RULE",
    help="Repeat everything with a raw rule such as rule=top-k,k=8, rule=dynamic-k,tau=0.1 or "
    "rule=null,bias=0.2; may be repeated.",
)
@option(
    "settings",
    "--reference",
    metavar="SRC",
    help="Checkpoint to compare with, usually the dense source.",
)
@option(
    "tasks",
    "--tasks",
    multiple=True,
    callback=_names,
    metavar="NAME,...",
    help="Tasks of lm-evaluation-harness, by name or as a task file (.yaml), which may run Python "
    "of its own.",
)
@option("tasks", "--task-limit", type=int, metavar="N", help="Documents of each task.")
@options.base_option()
@option("run", "--device", metavar="NAME", help="Default: an accelerator if there is one.")
@option(
    "run",
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    help="What to compute in; 'auto' is as stored.",
)
@option("run", "--batch-size", type=int, metavar="N", help="Blocks or texts run together.")
@option(
    "run", "--speed/--no-speed", default=True, help="Measure tokens per second of every setting."
)
@option(
    "output",
    "--out",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Write the results to a new JSON file too.",
)
@option(
    "output",
    "--record",
    is_flag=True,
    help="Keep loss, perplexity and agreement in the checkpoint's manifest and card, and real "
    "experts by class of token where there are null experts.",
)
@options.revision_option()
@options.json_option()
@verbosity_options
def evaluate(checkpoint: str, as_json: bool, **settings: Any) -> None:
    """Say how good a checkpoint is, and what it costs.

    Perplexity by document, agreement with a reference, FLOPs and weight bytes per token, tokens per
    second, use of every expert; accuracy of classifiers; where null experts take slots, the real
    experts per token, by layer and by class of token. The weights are not changed.
    """
    heard = begin(versions.EVALUATING)
    from adaconvert import api

    report = api.evaluate(checkpoint, progress=not heard.quiet, **settings)
    output.show(report, as_json=as_json)
