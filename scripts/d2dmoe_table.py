"""Compares D2DMoE with what it must beat, at equal FLOPs and equal training.

    python scripts/d2dmoe_table.py DENSE --work FOLDER --tokens 200k \\
        --train a.train.jsonl --train b.train.jsonl --valid a.valid.jsonl --valid b.valid.jsonl

For every seed: the dense model tuned (the reference); stage 1, split, contribution routers and
dynamic-k (D2DMoE); and for every level, the dense model with static neurons left out and then tuned
as long, and a random split with contribution routers, tuned as long with top-k on and its routers
then fitted again. All tuning reads the same tokens in the same order on the same schedule. A level
is a share of the dense model's feed-forward FLOPs, router included; each method takes its best
setting within it. Losses are paired by document. Folders and evaluations that --work holds are not
made again, so a stopped run goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from bench.pruning import prune

from adaconvert import api
from adaconvert.methods.sources import open_source

TAUS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.55)
LEVELS = "0.6,0.45,0.3"
Losses = dict[str, tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every run shares.

    Attributes:
        dense: checkpoint everything is made from.
        work: folder of everything made.
        train, valid: texts.
        tune: options of every fine-tune.
        stage_one: options of D2DMoE's on top.
        expert_width: neurons of an expert.
        eval_tokens: tokens of each text that are measured.
        device: of training and evaluation.
    """

    dense: Path
    work: Path
    train: tuple[str, ...]
    valid: tuple[str, ...]
    tune: Mapping[str, Any]
    stage_one: Mapping[str, Any]
    expert_width: int
    eval_tokens: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting of one model.

    Attributes:
        label: its setting.
        ffn: feed-forward and router FLOPs as a share of the dense model's.
        losses: document -> tokens and summed loss, over all texts.
    """

    label: str
    ffn: float
    losses: Losses


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("dense", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--train", multiple=True, required=True)
@click.option("--valid", multiple=True, required=True)
@click.option("--tokens", default="200k", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--levels", default=LEVELS, show_default=True)
@click.option("--expert-width", default=6, show_default=True)
@click.option("--activation", default="relu", show_default=True)
@click.option("--sparsity", default=1e-4, show_default=True, help="coefficient, raw square Hoyer")
@click.option("--distill", default=0.0, show_default=True, help="in stage 1")
@click.option("--lr", default=2e-4, show_default=True)
@click.option("--seq-len", default=512, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--accumulate", default=1, show_default=True)
@click.option("--precision", default="bf16", show_default=True)
@click.option("--eval-tokens", default=16384, show_default=True, help="of each text")
@click.option("--device", default="cpu", show_default=True)
def main(dense: Path, work: Path, seeds: str, levels: str, **options: Any) -> None:
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
        expert_width=options["expert_width"],
        eval_tokens=options["eval_tokens"],
        device=options["device"],
    )
    work.mkdir(parents=True, exist_ok=True)
    steps = [float(level) for level in levels.split(",")]
    runs = [run_seed(setup, int(seed), steps) for seed in seeds.split(",")]
    for line in table(runs, steps):
        click.echo(line)


def run_seed(setup: Setup, seed: int, levels: Sequence[float]) -> dict[str, list[Point]]:
    """Return every measured point of one seed, by method; "level:method" for the baselines."""
    reference = tuned(setup, setup.dense, f"reference-{seed}", seed)
    whole = ffn_flops(setup, reference)
    one = tuned(setup, setup.dense, f"stage1-{seed}", seed, **setup.stage_one)
    sparse = routed(setup, one, f"d2dmoe-{seed}", seed)
    found = {
        "reference": measure(setup, reference, whole),
        "d2dmoe": measure(setup, sparse, whole, [f"rule=dynamic-k,tau={tau}" for tau in TAUS]),
    }
    split = random_split(setup, seed)
    for level in levels:
        name = f"dropped-{level:g}"
        small = tuned(setup, dropped(setup, name, level), f"{name}-{seed}", seed)
        found[f"{level:g}:dropped"] = measure(setup, small, whole)
        select = f"rule=top-k,k={top_k(split, level)}"
        mixed = tuned(setup, split, f"random-{level:g}-{seed}", seed, select=select)
        # tuning moved the experts under the routers
        name = f"refitted-{level:g}-{seed}"
        mixed = routed(setup, mixed, name, seed, stages="3", expert_width=None)
        found[f"{level:g}:random"] = measure(setup, mixed, whole, [select])
    return found


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
    options = {"expert_width": setup.expert_width, "data": joined(setup), "seed": seed, **more}
    options = {key: value for key, value in options.items() if value is not None}
    return made(setup, name, lambda path: api.d2dmoe(source, path, device=setup.device, **options))


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
    cache = setup.work / f"{folder.name}.{setup.eval_tokens}.json"
    if not cache.exists():
        click.echo(f"measuring {folder.name}", err=True)
        found = [evaluation(setup, folder, where, select) for where in setup.valid]
        cache.write_text(json.dumps(found))
    texts = json.loads(cache.read_text())
    return [_point(settings, whole) for settings in zip(*texts, strict=True)]


def evaluation(
    setup: Setup, folder: Path, where: str, select: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the results of `evaluate` on one text as JSON data."""
    found = api.evaluate(
        folder,
        data=where,
        select=list(select),
        max_tokens=setup.eval_tokens,
        device=setup.device,
        dtype="float32",
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


# -- the table


def table(runs: Sequence[Mapping[str, list[Point]]], levels: Sequence[float]) -> list[str]:
    """Return the comparison as Markdown; differences are D2DMoE minus the other, per token, with
    the standard error over documents and seeds."""
    lines = [
        "| FFN FLOPs | seed | reference | D2DMoE (setting, FLOPs) | dropped | random top-k | "
        "D2DMoE - dropped | D2DMoE - random |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for level in levels:
        for seed, run in enumerate(runs):
            lines.append(_row(level, str(seed), run))
    lines.append("")
    for share in (0.01, 0.05):
        for seed, run in enumerate(runs):
            lines.append(_reach(share, seed, run))
    return lines


def _row(level: float, seed: str, run: Mapping[str, list[Point]]) -> str:
    within = [point for point in run["d2dmoe"] if point.ffn <= level]
    (base,) = run["reference"]
    others = [run[f"{level:g}:{name}"][0] for name in ("dropped", "random")]
    shown = [f"{mean(point):.4f}" for point in others]
    if not within:
        return f"| {level:g} | {seed} | {mean(base):.4f} | none within | {' | '.join(shown)} | | |"
    best = min(within, key=mean)
    ours = f"{mean(best):.4f} ({best.label}, {best.ffn:.3f})"
    differences = [difference(best, point) for point in others]
    cells = [f"{level:g}", seed, f"{mean(base):.4f}", ours, *shown, *differences]
    return f"| {' | '.join(cells)} |"


def _reach(share: float, seed: int, run: Mapping[str, list[Point]]) -> str:
    """Return the cheapest setting whose loss is at most `share` above the reference's."""
    bound = mean(run["reference"][0]) * (1 + share)
    fitting = [point for point in run["d2dmoe"] if mean(point) <= bound]
    what = f"loss {share:.0%} above the reference, seed {seed}"
    if not fitting:
        return f"- {what}: no setting reaches it at this budget"
    best = min(fitting, key=lambda point: point.ffn)
    return f"- {what}: {best.ffn:.3f} of the FFN FLOPs ({best.label})"


def mean(point: Point) -> float:
    """Return the loss per token."""
    tokens = sum(count for count, _ in point.losses.values())
    return sum(loss for _, loss in point.losses.values()) / tokens


def difference(ours: Point, other: Point) -> str:
    """Return ours minus the other's per token, with its standard error over documents."""
    common = sorted(set(ours.losses) & set(other.losses))
    counts = [ours.losses[name][0] for name in common]
    gaps = [ours.losses[name][1] - other.losses[name][1] for name in common]
    total = sum(counts)
    value = sum(gaps) / total
    spread = sum((gap - value * count) ** 2 for gap, count in zip(gaps, counts, strict=True))
    error = math.sqrt(spread * len(gaps) / max(len(gaps) - 1, 1)) / total
    return f"{value:+.4f} +- {error:.4f}"


if __name__ == "__main__":
    main()
