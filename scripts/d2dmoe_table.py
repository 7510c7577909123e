"""Compares D2DMoE with what it must beat, at equal FLOPs and equal training.

    python scripts/d2dmoe_table.py DENSE --work FOLDER --tokens 200k \\
        --train a.train.jsonl --train b.train.jsonl --valid a.valid.jsonl --valid b.valid.jsonl

For every seed: the dense model tuned (the reference); D2DMoE as published for the seeds of
--published (stage 1, balanced split, contribution routers, dynamic-k); and for every level, four
models tuned as long. "neurons" and "predicted" are D2DMoE with experts of one neuron, top-k on
while they are tuned: one is routed by the model's own gate, run in full, the other by contribution
routers, which are fitted again after tuning. "dropped" leaves out the neurons that
contribute least on average, for all tokens alike. "random" is a random split with contribution
routers, tuned with top-k on, its routers then fitted again. All tuning reads the same tokens in the
same order on the same schedule. A level is a share of the dense model's feed-forward FLOPs, router
included. Losses are paired by document, each cut to --characters so that all of them count. Folders
and evaluations that --work holds are not made again, so a stopped run goes on; --csv gets a row for
every measured setting.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from bench.d2dmoe_points import FIELDS, METHODS, Losses, Point, rows, table
from bench.pruning import prune
from bench.results import append, commit

from adaconvert import api
from adaconvert.methods.sources import open_source

TAUS = (0.02, 0.05, 0.1, 0.2, 0.4)
LEVELS = "0.6,0.5,0.4"
RESULTS = Path(__file__).resolve().parent / "bench" / "d2dmoe.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every run shares.

    Attributes:
        dense: checkpoint everything is made from.
        work: folder of everything made.
        train, valid: texts.
        tune: options of every fine-tune.
        stage_one: options of D2DMoE's on top.
        methods: what is compared.
        published: seeds D2DMoE as published is made for.
        expert_width: neurons of an expert, of the published form and the random split.
        routers: options of every fit of contribution routers.
        characters: what is left of each document that is measured.
        device: of training and evaluation.
    """

    dense: Path
    work: Path
    train: tuple[str, ...]
    valid: tuple[str, ...]
    tune: Mapping[str, Any]
    stage_one: Mapping[str, Any]
    methods: tuple[str, ...]
    published: frozenset[int]
    expert_width: int
    routers: Mapping[str, Any]
    characters: int
    device: str


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("dense", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--train", multiple=True, required=True)
@click.option("--valid", multiple=True, required=True)
@click.option("--tokens", default="200k", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--levels", default=LEVELS, show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--published", default="0", show_default=True, help="seeds of the published form")
@click.option("--expert-width", default=6, show_default=True)
@click.option("--activation", default="relu", show_default=True)
@click.option("--sparsity", default=1e-4, show_default=True, help="coefficient, raw square Hoyer")
@click.option("--distill", default=0.0, show_default=True, help="in stage 1")
@click.option("--lr", default=2e-4, show_default=True)
@click.option("--seq-len", default=512, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--accumulate", default=1, show_default=True)
@click.option("--precision", default="bf16", show_default=True)
@click.option("--router-steps", default=1000, show_default=True)
@click.option("--router-tokens", default=32768, show_default=True)
@click.option("--characters", default=1400, show_default=True, help="of each document measured")
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--device", default="cpu", show_default=True)
def main(
    dense: Path, work: Path, seeds: str, levels: str, published: str, csv: Path, **options: Any
) -> None:
    """Make what is missing, measure it, and print the table."""
    names = ("tokens", "lr", "seq_len", "batch_size", "accumulate", "precision")
    stage = {name: options[name] for name in ("activation", "sparsity", "distill")}
    setup = Setup(
        dense=dense,
        work=work,
        train=options["train"],
        valid=options["valid"],
        tune={name: options[name] for name in names},
        stage_one=stage,
        methods=tuple(options["methods"].split(",")),
        published=frozenset(int(seed) for seed in published.split(",") if seed),
        expert_width=options["expert_width"],
        routers={"router_steps": options["router_steps"], "data_tokens": options["router_tokens"]},
        characters=options["characters"],
        device=options["device"],
    )
    work.mkdir(parents=True, exist_ok=True)
    steps = [float(level) for level in levels.split(",")]
    shared = {
        "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(RESULTS.parents[2]),
        "model": dense.name,
        "tokens": setup.tune["tokens"],
    }
    runs = []
    for seed in map(int, seeds.split(",")):
        runs.append(run_seed(setup, seed, steps))
        for row in rows(runs[-1], **shared, seed=seed):
            append(csv, row, FIELDS)
        for line in table(runs, steps):
            click.echo(line)


def run_seed(setup: Setup, seed: int, levels: Sequence[float]) -> dict[str, list[Point]]:
    """Return every measured point of one seed: "reference", "published", "LEVEL:METHOD"."""
    reference = tuned(setup, setup.dense, f"reference-{seed}", seed)
    whole = ffn_flops(setup, reference)
    found = {"reference": measure(setup, reference, whole)}
    makers = {
        "neurons": single_neurons_top_k,
        "predicted": predicted_top_k,
        "dropped": pruned,
        "random": random_top_k,
    }
    for level in levels:
        for method in setup.methods:
            found[f"{level:g}:{method}"] = makers[method](setup, seed, level, whole)
    if seed in setup.published:
        found["published"] = published_form(setup, seed, whole)
    return found


def single_neurons_top_k(setup: Setup, seed: int, level: float, whole: float) -> list[Point]:
    """Return the one point of the model tuned with its gate as the router."""
    select = f"rule=top-k,k={neurons(setup, level)}"
    ours = tuned(setup, single_neurons(setup), f"neurons-{level:g}-{seed}", seed, select=select)
    return measure(setup, ours, whole, [select])


def pruned(setup: Setup, seed: int, level: float, whole: float) -> list[Point]:
    """Return the one point of the model tuned with the same neurons for every token."""
    name = f"dropped-{level:g}"
    small = tuned(setup, dropped(setup, name, level), f"{name}-{seed}", seed)
    return measure(setup, small, whole)


def predicted_top_k(setup: Setup, seed: int, level: float, whole: float) -> list[Point]:
    """Return the one point of single neurons chosen by contribution routers."""
    fine = routed(setup, setup.dense, f"predicted-{seed}", seed, expert_width=1)
    return refitted(setup, fine, f"predicted-{level:g}-{seed}", seed, level, whole)


def random_top_k(setup: Setup, seed: int, level: float, whole: float) -> list[Point]:
    """Return the one point of a random split with contribution routers."""
    split = random_split(setup, seed)
    return refitted(setup, split, f"random-{level:g}-{seed}", seed, level, whole)


def refitted(
    setup: Setup, split: Path, name: str, seed: int, level: float, whole: float
) -> list[Point]:
    """Return the one point of a split model tuned with top-k on, its routers then fitted again, as
    tuning moves the experts under them."""
    select = f"rule=top-k,k={top_k(split, level)}"
    mixed = tuned(setup, split, name, seed, select=select)
    mixed = routed(setup, mixed, f"re-{name}", seed, stages="3", expert_width=None)
    return measure(setup, mixed, whole, [select])


def published_form(setup: Setup, seed: int, whole: float) -> list[Point]:
    """Return a point per tau of the published stages."""
    one = tuned(setup, setup.dense, f"stage1-{seed}", seed, **setup.stage_one)
    sparse = routed(setup, one, f"d2dmoe-{seed}", seed)
    return measure(setup, sparse, whole, [f"rule=dynamic-k,tau={tau}" for tau in TAUS])


# -- what is made, unless it is there


def made(setup: Setup, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder of the work folder, after `make` when it is not there."""
    path = setup.work / name
    if not path.exists():
        click.echo(f"making {name}", err=True)
        make(path)
    return path


def tuned(setup: Setup, source: Path, name: str, seed: int, **more: Any) -> Path:
    """Return the checkpoint `source` tuned with."""

    def make(path: Path) -> None:
        api.finetune(
            source,
            path,
            data=setup.train,
            seed=seed,
            device=setup.device,
            resume=True,
            report=lambda line: click.echo(f"{name}: {line}", err=True),
            **{**setup.tune, **more},
        )

    return made(setup, name, make)


def routed(setup: Setup, source: Path, name: str, seed: int, **more: Any) -> Path:
    """Return `source` with contribution routers, split into balanced clusters unless it is split
    already."""
    options = {"expert_width": setup.expert_width, "data": joined(setup), **setup.routers, **more}
    options = {key: value for key, value in options.items() if value is not None}
    # losses are measured below, on more text than a verification reads
    where = {"device": setup.device, "seed": seed, "verify": False}
    return made(setup, name, lambda path: api.d2dmoe(source, path, **where, **options))


def single_neurons(setup: Setup) -> Path:
    """Return the dense model with every neuron an expert and its own gate as the router."""
    return made(
        setup,
        "neurons",
        lambda path: api.convert(
            setup.dense,
            destination=path,
            method="moefy",
            split="contiguous",
            expert_width=1,
            router="gate",
            verify=False,
        ),
    )


def random_split(setup: Setup, seed: int) -> Path:
    """Return the dense model split at random, with routers as good as D2DMoE's."""
    split = made(
        setup,
        f"split-{seed}",
        lambda path: api.convert(
            setup.dense,
            destination=path,
            method="moefy",
            split="random",
            expert_width=setup.expert_width,
            seed=seed,
            verify=False,
        ),
    )
    return routed(setup, split, f"random-{seed}", seed, stages="3", expert_width=None)


def dropped(setup: Setup, name: str, level: float) -> Path:
    """Return the dense model with a share of its neurons."""
    keep = math.floor(level * open_source(str(setup.dense)).spec.intermediate)
    return made(
        setup,
        name,
        lambda path: prune(setup.dense, path, list(setup.train), keep=keep, tokens=16384),
    )


def joined(setup: Setup) -> str:
    """Return one file with the documents of all training texts in turn, for fitting routers."""
    path = setup.work / "train.jsonl"
    if not path.exists():
        texts = [Path(where).read_text().splitlines() for where in setup.train]
        rows = [line for lines in zip(*texts, strict=False) for line in lines]
        path.write_text("\n".join(rows) + "\n")
    return str(path)


def neurons(setup: Setup, level: float) -> int:
    """Return the most neurons that fit a level after the gate, or up of a plain network, has run
    for all."""
    spec = open_source(str(setup.dense)).spec
    matrices = 3 if spec.traits.ffn == "glu" else 2
    share = (level - 1 / matrices) / (1 - 1 / matrices)
    return max(1, math.floor(share * spec.intermediate))


def top_k(split: Path, level: float) -> int:
    """Return the most experts that fit a level, router included."""
    adaptive = json.loads((split / "config.json").read_text())["adaptive"]
    ffn = next(iter(adaptive["sites"].values()))["ffn"]
    matrices = 3 if "gate" in ffn["weights"] or "gate_up" in ffn["weights"] else 2
    experts, hidden = ffn["experts"]["count"], ffn["hidden"]
    router = ffn["router"].get("width", 0) * (hidden + experts)
    whole = matrices * hidden * ffn["intermediate"]
    return max(1, math.floor((level * whole - router) / (whole / experts)))


# -- what is measured


def measure(setup: Setup, folder: Path, whole: float, select: Sequence[str] = ()) -> list[Point]:
    """Return a point for every setting of a checkpoint; kept beside it."""
    cache = setup.work / f"{folder.name}.{setup.characters}.json"
    if not cache.exists():
        click.echo(f"measuring {folder.name}", err=True)
        found = [evaluation(setup, folder, cut(setup, text), select) for text in setup.valid]
        cache.write_text(json.dumps(found))
    texts = json.loads(cache.read_text())
    return [_point(settings, whole) for settings in zip(*texts, strict=True)]


def cut(setup: Setup, where: str) -> Path:
    """Return a file with the beginning of every document of a text."""
    path = setup.work / f"{Path(where).stem}.{setup.characters}.jsonl"
    if not path.exists():
        texts = [json.loads(line)["text"] for line in Path(where).read_text().splitlines()]
        lines = [json.dumps({"text": text[: setup.characters]}) for text in texts]
        path.write_text("\n".join(lines) + "\n")
    return path


def evaluation(
    setup: Setup, folder: Path, where: Path, select: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the results of `evaluate` on one text as JSON data."""
    found = api.evaluate(
        folder,
        data=where,
        select=list(select),
        device=setup.device,
        speed=False,
    )
    return list(found.to_json()["settings"])


def _point(texts: Sequence[Mapping[str, Any]], whole: float) -> Point:
    losses: Losses = {}
    flops = []
    for text in texts:
        compute = text["compute"]
        flops.append(compute["ffn_flops_per_token"] + (compute["router_flops_per_token"] or 0.0))
        losses |= {d["name"]: (d["tokens"], d["loss"]) for d in text["documents"]}
    label = str(texts[0]["label"])
    return Point(label=label, ffn=sum(flops) / len(flops) / whole, losses=losses)


def ffn_flops(setup: Setup, reference: Path) -> float:
    """Return the feed-forward FLOPs of the dense model, per token."""
    spec = open_source(str(reference)).spec
    matrices = 3 if spec.traits.ffn == "glu" else 2
    return float(2 * matrices * spec.hidden * spec.intermediate * spec.layers)


if __name__ == "__main__":
    main()
