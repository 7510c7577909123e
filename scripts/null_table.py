"""Compares a mixture with null experts with what it must beat, at equal tokens.

    python scripts/null_table.py DENSE --work FOLDER \\
        --branch A --branch B --branch C --branch D \\
        --train prose.train.jsonl --train tech.train.jsonl \\
        --valid prose.valid.jsonl --valid tech.valid.jsonl

The branches are fine-tunes of DENSE, each on its own text; they become the experts of a mixture
that runs two. See bench/null_models.py for the models made of it, all tuned on the same tokens in
the same order on the same schedule. Every model is measured on the first --characters of every
document of --valid: loss, paired by document; the share of the experts' FLOPs that was used, by
layer; the share of tokens that ran no expert; FLOPs per token. A bias that was set without training
on --control-tokens of one domain is measured on all of them. A domain is what the name of a text
begins with, up to the first dot.

Models and evaluations that --work holds are not made again, whatever options were given then.
--only makes and measures some models and adds no rows, so that several processes can share the work
once "base" is there; --rows adds the rows of what has been measured and makes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml
from bench.null_models import Models, Setup
from bench.null_rows import ALL, FIELDS, Measured, misses, rows, table
from bench.results import keep, machine, run_of

from adaconvert import api
from adaconvert.train.config import parse_count

RESULTS = Path(__file__).resolve().parent / "bench" / "null.csv"
#: options of the script that every tuning takes.
TUNED = ("seq_len", "batch_size", "lr", "precision")
#: experts of a token of the mixture.
TOP_K = 2


class _Count(click.ParamType):
    """A number of tokens, such as 65536 or 50k."""

    name = "count"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return the number."""
        return parse_count(value, param.opts[0])


COUNT = _Count()


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("dense", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--branch", "branches", multiple=True, required=True, help="one for each expert")
@click.option("--train", multiple=True, required=True, help="one for each domain")
@click.option("--valid", multiple=True, required=True, help="one for each domain")
@click.option(
    "--branch-train",
    "branch_text",
    multiple=True,
    help="text of the branches; the dense model is also tuned on as many tokens of it",
)
@click.option("--branch-tokens", type=COUNT, help="of all branches  [default: as they tell]")
@click.option("--tokens", type=COUNT, default=65536, show_default=True, help="of the base")
@click.option("--more-tokens", type=COUNT, default=65536, show_default=True, help="from there on")
@click.option("--targets", default="0.85,0.7,0.5", show_default=True)
@click.option("--null-experts", default=4, show_default=True)
@click.option("--control-tokens", type=COUNT, default="50k", show_default=True)
@click.option("--parts", default="all", show_default=True, help="trained in mixtures")
@click.option("--lr", default=1e-4, show_default=True)
@click.option("--router-lr", default=5e-4, show_default=True)
@click.option("--seq-len", default=256, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--precision", default="bf16", show_default=True)
@click.option("--router-prompts", help="file; routers start from its hidden states")
@click.option("--null-option", multiple=True, metavar="NAME=VALUE", help="of tuning with nulls")
@click.option("--start-option", multiple=True, metavar="NAME=VALUE", help="of `adamoe` before it")
@click.option("--tag", default="", help="of what has options of its own, in its name")
@click.option("--characters", default=2400, show_default=True, help="of each document measured")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--only", multiple=True, metavar="NAME", help="make and measure these models alone")
@click.option("--rows", "rows_only", is_flag=True, help="of what is measured; make nothing")
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
def main(
    dense: Path,
    work: Path,
    valid: tuple[str, ...],
    characters: int,
    only: tuple[str, ...],
    rows_only: bool,
    csv: Path,
    **options: Any,
) -> None:
    """Make what is missing, measure it, and add the rows."""
    work.mkdir(parents=True, exist_ok=True)
    setup = setup_of(dense, work, options)
    texts = {domain(where): cut(work, Path(where), characters) for where in valid}
    models = Models(setup)
    for name in () if rows_only else only or setup.names:
        measure(models, name, texts)
    if only:
        return
    found = {name: read(models, name, texts) for name in measured(setup, texts)}
    shared = {**run_of(dense.name), "cores": machine()["cores"], "seed": setup.seed}
    made = keep(csv, rows(found, work), shared, FIELDS)
    for line in (*table(made), "", "share of the experts' FLOPs minus the target:", *misses(made)):
        click.echo(line)


def setup_of(dense: Path, work: Path, options: Mapping[str, Any]) -> Setup:
    """Return what the options of the command ask for."""
    prompts = options["router_prompts"]
    return Setup(
        dense=dense,
        branches=tuple(map(Path, options["branches"])),
        branch_text=options["branch_text"],
        work=work,
        train={domain(where): where for where in options["train"]},
        tokens=(options["tokens"], options["more_tokens"]),
        branch_tokens=options["branch_tokens"],
        upcycle={"router_init": "hidden", "router_prompts": prompts} if prompts else {},
        parts=tuple(options["parts"].split(",")),
        router_lr=options["router_lr"],
        tune={name: options[name] for name in TUNED},
        null_tune=given(options["null_option"]),
        null_start=given(options["start_option"]),
        tag=options["tag"],
        nulls=options["null_experts"],
        targets=tuple(float(target) for target in options["targets"].split(",")),
        control_tokens=options["control_tokens"],
        seed=options["seed"],
        device=options["device"],
    )


def given(texts: tuple[str, ...]) -> dict[str, Any]:
    """Return options written as NAME=VALUE."""
    pairs = [text.partition("=") for text in texts]
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def domain(where: str) -> str:
    """Return the domain of a text."""
    return Path(where).name.partition(".")[0]


def cut(work: Path, where: Path, characters: int) -> Path:
    """Return a file with the beginning of every document of a text."""
    path = work / f"{where.stem}.{characters}.jsonl"
    if not path.exists():
        texts = [json.loads(line)["text"] for line in where.read_text().splitlines()]
        lines = [json.dumps({"text": text[:characters]}) for text in texts]
        path.write_text("\n".join(lines) + "\n")
    return path


def measure(models: Models, name: str, texts: Mapping[str, Path]) -> None:
    """A model's evaluations are in the work folder, beside the model."""
    folder = models.folder(name)
    for text in texts.values():
        cache = kept(models.setup, name, text)
        if not cache.exists():
            click.echo(f"measuring {name} on {text.stem}", err=True)
            done = api.evaluate(folder, data=text, device=models.setup.device, speed=False)
            (found,) = done.to_json()["settings"]
            cache.write_text(json.dumps(found))


def kept(setup: Setup, name: str, text: Path) -> Path:
    """Return the file an evaluation is kept in."""
    return setup.work / f"{name}.{text.stem}.json"


def measured(setup: Setup, texts: Mapping[str, Path]) -> list[str]:
    """Return the models that have been measured on every text, in the order they are made."""
    names = [
        {path.name.removesuffix(f".{text.stem}.json") for path in setup.work.glob(pattern)}
        for text in texts.values()
        for pattern in [f"*.{text.stem}.json"]
    ]
    found = set.intersection(*names)
    return [*(name for name in setup.names if name in found), *sorted(found - {*setup.names})]


def read(models: Models, name: str, texts: Mapping[str, Path]) -> dict[str, Measured]:
    """Return what was measured of a model, by text."""
    folder = models.path(name)
    said = {where: kept(models.setup, name, text).read_text() for where, text in texts.items()}
    found = {
        where: Measured.of(folder, json.loads(text), where, TOP_K) for where, text in said.items()
    }
    return {**found, ALL: Measured.pooled(list(found.values()))}


if __name__ == "__main__":
    main()
