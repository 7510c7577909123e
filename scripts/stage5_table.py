"""Measures stage 5 of D2DMoE: how well networks stand in for attention projections.

    python scripts/stage5_table.py DENSE --work FOLDER --layers 14 \\
        --train a.train.jsonl --train b.train.jsonl --valid a.valid.jsonl --valid b.valid.jsonl

`d2dmoe --stages 5` replaces the projections of --layers, of all blocks without it; one block and
its hidden states are in memory at a time, the states of all tokens in FOLDER. A "fit" row of a
projection has the network's squared error on the tenth of --tokens it was not trained on, over the
variance of the projection's outputs; the same of the best linear map of as many FLOPs, which has
the rank of the network's hidden width; the share of hidden units that are zero; and the rank
correlation of its router's scores with the true contributions. With --valid, a "loss" row of a
setting has the loss over the dense model, paired by document, each cut to --characters; this part
holds the whole model in memory. FLOPs are those of the networks and their routers as a share of the
projections'. A checkpoint or evaluation that FOLDER holds is not made again. On SmolLM2-135M with
--layers 14 it takes about 4 minutes of one core.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from bench.d2dmoe_points import Losses, Point, difference, mean
from bench.results import append, commit

from adaconvert import api
from adaconvert.arch.projections import ROLES

RESULTS = Path(__file__).resolve().parent / "bench" / "stage5.csv"
TAUS = "0.1,0.2,0.4"
FIELDS = (
    *("run", "commit", "model", "seed", "tokens", "layers", "experts", "steps", "lr", "sparsity"),
    *("row", "layer", "projection", "error", "linear", "zeros", "router_rank"),
    *("setting", "flops", "documents", "eval_tokens", "loss", "over_dense", "over_dense_se"),
)
#: an option of the script -> the option of `d2dmoe`.
FITTED = {
    "experts": "projection_experts",
    "steps": "projection_steps",
    "lr": "projection_lr",
    "sparsity": "projection_sparsity",
    "tokens": "data_tokens",
    "seed": "seed",
}
Row = dict[str, object]


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("dense", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--train", multiple=True, required=True)
@click.option("--valid", multiple=True, help="none: nothing but the fits is measured")
@click.option("--layers", help="blocks, as for `d2dmoe --layers`  [default: all]")
@click.option("--tokens", default=16384, show_default=True, help="to fit on")
@click.option("--experts", default=8, show_default=True)
@click.option("--steps", default=1000, show_default=True)
@click.option("--lr", default=3e-3, show_default=True)
@click.option("--sparsity", default=1e-4, show_default=True)
@click.option("--taus", default=TAUS, show_default=True)
@click.option("--characters", default=800, show_default=True, help="of each document measured")
@click.option("--seed", default=0, show_default=True)
@click.option("--csv", "rows_in", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--device", default="cpu", show_default=True)
def main(
    dense: Path,
    work: Path,
    train: tuple[str, ...],
    valid: tuple[str, ...],
    rows_in: Path,
    **options: Any,
) -> None:
    """Make what is missing, measure it, and print the table."""
    work.mkdir(parents=True, exist_ok=True)
    fitted = {name: options[name] for name in FITTED}
    shared: Row = {
        "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(RESULTS.parents[2]),
        "model": dense.name,
        "layers": options["layers"] or "all",
        **fitted,
    }
    layers, device = options["layers"], options["device"]
    folder = replaced(dense, work, joined(work, train), layers, fitted, device)
    found = [{**shared, **row} for row in fit_rows(folder)]
    if valid:
        texts = [cut(work, where, options["characters"]) for where in valid]
        taus = [float(tau) for tau in options["taus"].split(",")]
        found += [{**shared, **row} for row in loss_rows(dense, folder, texts, taus, device)]
    for row in found:
        append(rows_in, row, FIELDS)
    for line in table(found):
        click.echo(line)


# -- what is made, unless it is there


def replaced(
    dense: Path,
    work: Path,
    text: Path,
    layers: str | None,
    fitted: Mapping[str, Any],
    device: str,
) -> Path:
    """Return the dense model with networks in place of its projections."""
    name = "-".join([layers or "all", *(f"{key}={value}" for key, value in fitted.items())])
    folder = work / name
    if not folder.exists():
        click.echo(f"making {name}", err=True)
        api.d2dmoe(
            dense,
            folder,
            stages="5",
            layers=layers,
            data=str(text),
            work=str(work / f"{name}.states"),
            # losses are measured below, on more text than a verification reads
            verify=False,
            device=device,
            **{FITTED[key]: value for key, value in fitted.items()},
        )
    return folder


def joined(work: Path, train: Sequence[str]) -> Path:
    """Return one file with the documents of all training texts in turn."""
    path = work / "train.jsonl"
    if not path.exists():
        texts = [Path(where).read_text().splitlines() for where in train]
        lines = [line for lines in zip(*texts, strict=False) for line in lines]
        path.write_text("\n".join(lines) + "\n")
    return path


def cut(work: Path, where: str, characters: int) -> Path:
    """Return a file with the beginning of every document of a text."""
    path = work / f"{Path(where).stem}.{characters}.jsonl"
    if not path.exists():
        texts = [json.loads(line)["text"] for line in Path(where).read_text().splitlines()]
        lines = [json.dumps({"text": text[:characters]}) for text in texts]
        path.write_text("\n".join(lines) + "\n")
    return path


# -- what is measured


def fit_rows(folder: Path) -> Iterator[Row]:
    """Yield a row for every network of a checkpoint, as its config.json tells."""
    sites = json.loads((folder / "config.json").read_text())["adaptive"]["sites"]
    networks = [
        (next(int(part) for part in path.split(".") if part.isdigit()), slots["linear"]["mlp"])
        for path, slots in sites.items()
    ]
    for layer, mlp in sorted(networks, key=lambda pair: (pair[0], ROLES.index(pair[1]["role"]))):
        quality, router = mlp["quality"], mlp["router"].get("quality")
        yield {
            "row": "fit",
            "layer": layer,
            "projection": mlp["role"],
            "error": f"{quality['error']:.4f}",
            "linear": f"{quality['linear']:.4f}",
            "zeros": f"{quality['zeros']:.3f}",
            "router_rank": "" if router is None else f"{router['spearman']:.3f}",
        }


def loss_rows(
    dense: Path, folder: Path, texts: Sequence[Path], taus: Sequence[float], device: str
) -> Iterator[Row]:
    """Yield a row for every setting of a checkpoint, the dense model's first."""
    (base,) = measured(folder.parent, dense, texts, [], device)
    settings = ["rule=all", *(f"rule=dynamic-k,tau={tau:g}" for tau in taus)]
    for point in [base, *measured(folder.parent, folder, texts, settings, device)]:
        rise, error = difference(point, base)
        yield {
            "row": "loss",
            "setting": "dense" if point is base else point.label,
            "flops": "" if point is base else f"{point.ffn:.4f}",
            "documents": len(point.losses),
            "eval_tokens": sum(count for count, _ in point.losses.values()),
            "loss": f"{mean(point):.5f}",
            "over_dense": f"{rise:.5f}",
            "over_dense_se": f"{error:.5f}",
        }


def measured(
    work: Path, folder: Path, texts: Sequence[Path], select: Sequence[str], device: str
) -> list[Point]:
    """Return a point for every setting; evaluations are kept in the work folder."""
    found = []
    for text in texts:
        cache = work / f"{folder.name}.{text.stem}.{'+'.join(select) or 'stored'}.json"
        if not cache.exists():
            click.echo(f"measuring {folder.name} on {text.name}", err=True)
            said = api.evaluate(folder, data=text, select=list(select), device=device, speed=False)
            cache.write_text(json.dumps(said.to_json()["settings"]))
        found.append(json.loads(cache.read_text()))
    config = json.loads((folder / "config.json").read_text())
    whole = config.get("adaptive", {}).get("reference", {}).get("linear_flops_per_token", 1)
    return [_point(settings, whole) for settings in zip(*found, strict=True)]


def _point(texts: Sequence[Mapping[str, Any]], whole: float) -> Point:
    """Return one setting over all texts, with its cost as a share of `whole` FLOPs."""
    losses: Losses = {}
    flops = []
    for text in texts:
        compute = text["compute"]
        parts = ("projection_flops_per_token", "router_flops_per_token")
        flops.append(sum(compute[part] or 0.0 for part in parts))
        losses |= {d["name"]: (d["tokens"], d["loss"]) for d in text["documents"]}
    return Point(label=str(texts[0]["label"]), ffn=sum(flops) / len(flops) / whole, losses=losses)


# -- what is kept and shown


def table(found: Sequence[Row]) -> Iterator[str]:
    """Yield the rows of one run as two Markdown tables."""
    shown = {
        "fit": ("layer", "projection", "error", "linear", "zeros", "router_rank"),
        "loss": ("setting", "flops", "loss", "over_dense", "over_dense_se"),
    }
    for kind, names in shown.items():
        rows = [row for row in found if row["row"] == kind]
        if rows:
            yield f"| {' | '.join(names)} |"
            yield f"| {' | '.join('---' for _ in names)} |"
            yield from (f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows)
            yield ""


if __name__ == "__main__":
    main()
