"""Compares heads of early exits that were trained on equal tokens with a frozen trunk.

    python scripts/exit_table.py DENSE --work FOLDER --exits 10,15,20,25 \\
        --train prose.train.jsonl --valid prose.valid.jsonl --tokens 400k --lr 1e-3 --lr 3e-4

Each --case is a kind of head of `adaconvert early-exit`, with "-tied" where its output matrix stays
the model's; "affine" is the tuned lens, which must be beaten. Every case is trained by `adaconvert
finetune --train exits` at every --lr, or at one of its own ("mlp-tied@1e-2"), on the same tokens in
the same order. A row says, for one exit
of one case at one rate, what it loses on held-out text and how often it chooses the token the whole
model chooses, before training and after.

Runs that --work holds are not made again. --only makes some without adding rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from bench.exit_rows import FIELDS, rows, table
from bench.results import keep, run_of

from adaconvert import api

RESULTS = Path(__file__).resolve().parent / "bench" / "exits.csv"
CASES = ("affine", "norm-tied", "mlp-tied", "layer-tied")


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("dense", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--exits", default="10,15,20,25", show_default=True, help="blocks before each")
@click.option("--case", "cases", multiple=True, default=CASES, show_default=True)
@click.option("--train", multiple=True, required=True)
@click.option("--valid", multiple=True, required=True)
@click.option("--valid-tokens", default="20k", show_default=True, help="of each")
@click.option("--tokens", default="200k", show_default=True)
@click.option("--lr", "lrs", multiple=True, type=float, default=(1e-3,), show_default=True)
@click.option("--exit-loss", default="ce", show_default=True)
@click.option("--exit-chunk", default=256, show_default=True)
@click.option("--seq-len", default=256, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--precision", default="bf16", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--only", multiple=True, metavar="CASE")
@click.option("--name", help="of the model in the rows  [default: its folder's]")
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
def main(
    dense: Path,
    work: Path,
    cases: tuple[str, ...],
    lrs: tuple[float, ...],
    only: tuple[str, ...],
    name: str | None,
    csv: Path,
    **options: Any,
) -> None:
    """Train what is missing, and add the rows."""
    work.mkdir(parents=True, exist_ok=True)
    wanted = [case for case in cases if not only or case in only]
    found = dict(_runs(dense, work, wanted, lrs, options))
    if only:
        return
    for line in table(keep(csv, rows(found), run_of(name or dense.name), FIELDS)):
        click.echo(line)


def _runs(
    dense: Path, work: Path, cases: list[str], lrs: tuple[float, ...], options: dict[str, Any]
) -> Iterator[tuple[tuple[str, float], dict[str, Any]]]:
    """Yield (case, rate) and what its run says of itself, made where it is missing."""
    for name in cases:
        case, _, own = name.partition("@")
        start = work / case
        if not start.exists():
            click.echo(f"making {case}", err=True)
            head, _, tied = case.partition("-")
            more = {"tie_heads": True} if tied else {}
            api.convert(
                dense,
                destination=start,
                method="early-exit",
                exits=options["exits"],
                head=head,
                **more,
            )
        for lr in (float(own),) if own else lrs:
            path = work / f"{case}_{lr:g}"
            if not path.exists():
                _tune(start, path, lr, options)
            yield (case, lr), _told(path)


def _tune(start: Path, path: Path, lr: float, options: dict[str, Any]) -> None:
    """Train the exits of a case."""
    kept = ("tokens", "valid_tokens", "exit_loss", "exit_chunk", "seq_len", "batch_size")
    api.finetune(
        start,
        path,
        data=options["train"],
        valid=options["valid"],
        train=("exits",),
        lr=lr,
        device=options["device"],
        precision=options["precision"],
        seed=options["seed"],
        save_every=0,
        report=lambda line: click.echo(f"{path.name}: {line}", err=True),
        **{key: options[key] for key in kept},
    )


def _told(path: Path) -> dict[str, Any]:
    """Return what a run recorded of itself: options, counts and measurements."""
    record = json.loads((path / "adaconvert.json").read_text())
    return {**record["training"], "options": record["options"]}


if __name__ == "__main__":
    main()
