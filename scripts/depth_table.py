"""Compares models that spend less depth, made in several ways and tuned on equal tokens.

    python scripts/depth_table.py DENSE --work FOLDER --level 0.9,0.75,0.6 \\
        --train prose.train.jsonl --valid prose.valid.jsonl --tokens 40k --lr 1e-4

Every --case is made at every --level, FLOPs per token as a share of DENSE's with texts of 512
tokens, and trained by `adaconvert finetune` at every --lr on the same tokens in the same order:

    drop-even       whole blocks gone, evenly spaced ones
    drop-searched   whole blocks gone, those a greedy search on --search-tokens found
    skip            tokens may skip blocks
    skip-from-drop  the same, from searched blocks that nobody runs and that save three fifths
    skip-searched   searched blocks that nobody runs, adapters in their place, and no routing
    mod             mixture-of-depths
    dense           DENSE itself tuned

A case with "-frozen" trains routers and adapters alone; the others all parameters. What is measured
on held-out text is the causal decision; "loss_top_k" is where the best tokens of a text run, which
looks ahead and is optimistic. Routers learn at --router-lr, what skipped tokens run instead at
--adapter-lr. "over_searched" is against searched blocks at the same level and the best --lr of
theirs.

Runs that --work holds are not made again. --only makes some without adding rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from bench.depth_models import (
    CASES,
    DENSE,
    EVEN,
    REPLACED,
    SEARCHED,
    blocks_for,
    made,
    replaced_for,
    searched,
    share_with,
    tuned,
)
from bench.depth_rows import FIELDS, rows, table
from bench.results import keep, run_of

from adaconvert.methods.depth.choose import count_of, evenly, share_without
from adaconvert.methods.depth.config import DepthOptions
from adaconvert.methods.sources import open_source

RESULTS = Path(__file__).resolve().parent / "bench" / "depth.csv"
FROZEN = "-frozen"
#: how much lower than the levels the search goes.
SPARE = 0.93


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("dense", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--level", "levels", default="0.9,0.75,0.6", show_default=True)
@click.option("--case", "cases", multiple=True, default=(*CASES, "skip-frozen"), show_default=True)
@click.option("--train", multiple=True, required=True)
@click.option("--valid", multiple=True, required=True)
@click.option("--valid-tokens", default="20k", show_default=True, help="of each")
@click.option("--tokens", default="40k", show_default=True)
@click.option("--lr", "lrs", multiple=True, type=float, default=(1e-4,), show_default=True)
@click.option("--frozen-lr", default=1e-3, show_default=True, help="where the rest is frozen")
@click.option("--router-lr", default=3e-4, show_default=True)
@click.option("--adapter-lr", type=float, help="[default: --lr]")
@click.option("--search-tokens", default=1024, show_default=True)
@click.option("--seq-len", default=256, show_default=True)
@click.option("--batch-size", default=2, show_default=True)
@click.option("--precision", default="bf16", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--only", multiple=True, metavar="CASE")
@click.option("--name", help="of the model in the rows  [default: its folder's]")
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
def main(
    dense: Path,
    work: Path,
    levels: str,
    cases: tuple[str, ...],
    only: tuple[str, ...],
    name: str | None,
    csv: Path,
    **options: Any,
) -> None:
    """Train what is missing, and add the rows."""
    work.mkdir(parents=True, exist_ok=True)
    wanted = [case for case in cases if not only or case in only]
    found = list(_runs(dense, work, wanted, [float(level) for level in levels.split(",")], options))
    if only:
        return
    for line in table(keep(csv, rows(found), run_of(name or dense.name), FIELDS)):
        click.echo(line)


def _runs(
    dense: Path, work: Path, cases: list[str], levels: list[float], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield what every run is, and what it says of itself, made where it is missing."""
    text = {
        "data": options["train"][0],
        "data_tokens": options["search_tokens"],
        "data_length": 512,
    }
    # adapters cost something, so that more blocks go where they are
    order = searched(dense, work, min(levels) * SPARE, text)
    spec = open_source(str(dense)).spec
    for level in levels:
        gone = {
            EVEN: ",".join(
                map(str, evenly(spec.layers, count_of(DepthOptions(compute=level), spec)))
            ),
            SEARCHED: blocks_for(dense, level, order),
            REPLACED: replaced_for(dense, level, order),
        }
        for name in cases:
            case = name.removesuffix(FROZEN)
            frozen = name.endswith(FROZEN)
            if case == DENSE and level != levels[0]:
                continue
            dropped = gone.get(case, "")
            left = share_without(spec, tuple(map(int, dropped.split(",")))) if dropped else 1.0
            left = share_with(dense, dropped) if case == REPLACED else left
            start = made(case, dense, work / f"{case}_{level:g}", level, order)
            for lr in (options["frozen_lr"],) if frozen else options["lrs"]:
                path = work / f"{name}_{level:g}_{lr:g}"
                run = tuned(case, start, path, level, _tuning(options, frozen=frozen), lr)
                yield {
                    "case": name,
                    "level": f"{level:g}",
                    "lr": lr,
                    "dropped": dropped,
                    "compute": left,
                    "run": run,
                }


def _tuning(options: dict[str, Any], *, frozen: bool) -> dict[str, Any]:
    """Return the options of a fine-tune."""
    kept = ("valid", "valid_tokens", "tokens", "router_lr", "seq_len", "batch_size", "precision")
    kept += ("adapter_lr",)
    return {
        **{key: options[key] for key in (*kept, "seed", "device")},
        "data": options["train"],
        "train": ("depth",) if frozen else ("all",),
    }


if __name__ == "__main__":
    main()
