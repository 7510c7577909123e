"""What keeping part of the FFNs costs without training: split x expert width x router x rule.

    python scripts/granularity_table.py DENSE --train A.train.jsonl B.train.jsonl \
        --valid prose=A.valid.jsonl tech=B.valid.jsonl --work DIR

Splits, routers and thresholds are fitted on the training text, losses are measured on the
validation text of every domain. Each setting is held to a level of FFN FLOPs per token, its router
included, and compared document by document with the dense model and with the static baseline of
the same level: the neurons with the largest mean |h| ||down||, the same for every token. Rows are
appended to a CSV file as they are measured; settings that are there already are not measured again,
and a stopped fit goes on from its last layer, so a run may be spread over several. The losses of
every document are kept in DIR. `--table` shows the last run, `--only PATTERN` measures some.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.granularity_cells import DENSE, Cell, cells
from bench.granularity_fit import fit
from bench.granularity_run import Masked, shape_of
from bench.results import commit

from adaconvert.data.text import documents_of, read_documents
from adaconvert.data.tokens import TokenBlocks, token_blocks

RESULTS = Path(__file__).resolve().parent / "bench" / "granularity.csv"
#: characters of a token of prose, for cutting documents so that many of them are used.
CHARACTERS = 4.5
FIELDS = (
    *("run", "commit", "model", "dtype", "domain", "documents", "tokens"),
    *("split", "width", "router", "rule", "level", "ffn_flops", "neurons"),
    *("loss", "perplexity", "rise", "rise_se", "over_static", "over_static_se", "seconds"),
)
Losses = Mapping[str, list[float]]


def main() -> int:
    """Fit and measure what is missing, or print the table."""
    arguments = _parse()
    if arguments.table:
        print(table(read(arguments.csv)))
        return 0
    train = _blocks(arguments.dense, arguments.train, arguments.train_tokens, arguments.seed)
    domains = dict(pair.split("=", 1) for pair in arguments.valid)
    valid = {
        name: _blocks(arguments.dense, [Path(path)], arguments.tokens, arguments.seed)
        for name, path in domains.items()
    }
    shape = shape_of(arguments.dense)
    wanted = list(cells(shape, full=arguments.full))
    arrays = fit(
        arguments.dense,
        train,
        wanted,
        arguments.work / "fits",
        steps=arguments.steps,
        seed=arguments.seed,
    )
    if arguments.fit_only:
        return 0
    pattern = re.compile(arguments.only)
    kept = [c for c in wanted if c in (DENSE,) or c.split == "static" or pattern.search(c.name)]
    Table(arguments, Masked(arguments.dense, arrays, arguments.dtype), valid).measure(kept)
    print(table(read(arguments.csv)))
    return 0


class Table:
    """The rows of one run."""

    def __init__(
        self, arguments: argparse.Namespace, model: Masked, valid: Mapping[str, TokenBlocks]
    ) -> None:
        self._arguments, self._model, self._valid = arguments, model, valid
        self._path = arguments.work / "losses.jsonl"
        self._digest = {name: blocks.digest[:12] for name, blocks in valid.items()}
        self._losses: dict[tuple[str, str], Losses] = {}
        self._shares: dict[tuple[str, str], float] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                self._remember(json.loads(line))

    def measure(self, wanted: Sequence[Cell]) -> None:
        """Every cell has a row for every domain."""
        for number, cell in enumerate(wanted, 1):
            for domain, blocks in self._valid.items():
                if (cell.name, domain) in self._losses:
                    continue
                started = time.monotonic()
                losses, share = self._model.losses(cell, blocks)
                seconds = time.monotonic() - started
                entry = {
                    "cell": cell.name,
                    "domain": domain,
                    "dtype": self._arguments.dtype,
                    "data": self._digest[domain],
                    "share": share,
                    "losses": {str(k): v for k, v in losses.items()},
                }
                self._remember(entry)
                with self._path.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                row = self._row(cell, domain, seconds)
                append(self._arguments.csv, row)
                print(
                    f"{number}/{len(wanted)} {domain} {cell.name}: {float(row['ffn_flops']):.3f} "
                    f"FLOPs, loss {float(row['loss']):.4f} ({seconds:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )

    def _remember(self, entry: dict[str, object]) -> None:
        domain = str(entry["domain"])
        if (entry["dtype"], entry["data"]) != (self._arguments.dtype, self._digest.get(domain)):
            return
        place = (str(entry["cell"]), domain)
        self._losses[place] = entry["losses"]  # type: ignore[assignment]
        self._shares[place] = float(entry["share"])  # type: ignore[arg-type]

    def _row(self, cell: Cell, domain: str, seconds: float) -> dict[str, object]:
        mine, share = self._losses[cell.name, domain], self._shares[cell.name, domain]
        loss = sum(s for s, _ in mine.values()) / sum(n for _, n in mine.values())
        static = f"static/1/none/fixed/{cell.level:g}"
        rise = paired(mine, self._losses.get((DENSE.name, domain)))
        over = paired(mine, self._losses.get((static, domain)))
        flops = share if cell.split == "static" else self._model.shape.flops(cell, share)
        return {
            "run": self._arguments.run,
            "commit": commit(Path(__file__).parent),
            "model": self._arguments.dense.name,
            "dtype": self._arguments.dtype,
            "domain": domain,
            "documents": len(mine),
            "tokens": int(sum(n for _, n in mine.values())),
            "split": cell.split,
            "width": cell.width,
            "router": cell.router,
            "rule": cell.rule,
            "level": cell.level,
            "ffn_flops": f"{flops:.4f}",
            "neurons": f"{share:.4f}",
            "loss": f"{loss:.5f}",
            "perplexity": f"{math.exp(min(loss, 50)):.3f}",
            **dict(zip(("rise", "rise_se"), rise, strict=True)),
            **dict(zip(("over_static", "over_static_se"), over, strict=True)),
            "seconds": f"{seconds:.1f}",
        }


def paired(mine: Losses, other: Losses | None) -> tuple[str, str]:
    """Return the difference in loss per token, and its standard error over documents.

    Documents weigh by their tokens; the error is that of a ratio of sums.
    """
    if other is None or set(mine) != set(other):
        return "", ""
    differences = [mine[d][0] - other[d][0] for d in mine]
    tokens = [mine[d][1] for d in mine]
    mean = sum(differences) / sum(tokens)
    count = len(tokens)
    if count < 2:
        return f"{mean:.5f}", ""
    rest = sum((x - mean * n) ** 2 for x, n in zip(differences, tokens, strict=True))
    error = math.sqrt(rest * count / (count - 1)) / sum(tokens)
    return f"{mean:.5f}", f"{error:.5f}"


def _blocks(folder: Path, paths: Sequence[Path], tokens: int, seed: int) -> TokenBlocks:
    """Return the beginnings of all documents, `tokens` in all and shared equally."""
    texts = [text for path in paths for text in read_documents(path).texts]
    length = int(tokens * CHARACTERS / len(texts)) + 200
    cut = documents_of(tuple(text[:length] for text in texts))
    return token_blocks(cut, folder, max_tokens=tokens, seed=seed)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of the last run in a CSV file; none when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["run"] == rows[-1]["run"]]


def append(path: Path, row: Mapping[str, object]) -> None:
    """The row is in the CSV file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the rows as a Markdown table, one line a setting."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    lines: dict[tuple[str, ...], dict[str, Mapping[str, str]]] = {}
    for row in rows:
        place = tuple(row[key] for key in ("split", "width", "router", "rule", "level"))
        lines.setdefault(place, {})[row["domain"]] = row
    head = ["split", "width", "router", "rule", "FFN FLOPs", "neurons"]
    head += [f"{what} {domain}" for domain in domains for what in ("ppl", "rise", "- static")]
    text = [" | ".join(["", *head, ""]).strip(), "|" + " --- |" * len(head)]
    for place, found in lines.items():
        mean = [
            sum(float(row[key]) for row in found.values()) / len(found)
            for key in ("ffn_flops", "neurons")
        ]
        columns = [*place[:4], *(f"{value:.2f}" for value in mean)]
        for domain in domains:
            measured = found.get(domain)
            columns += ["", "", ""] if measured is None else _numbers(measured)
        text.append("| " + " | ".join(columns) + " |")
    return "\n".join(text)


def _numbers(row: Mapping[str, str]) -> list[str]:
    def with_error(key: str) -> str:
        if not row[key]:
            return ""
        error = f" +- {float(row[key + '_se']):.3f}" if row[key + "_se"] else ""
        return f"{float(row[key]):+.3f}{error}"

    return [f"{float(row['perplexity']):.2f}", with_error("rise"), with_error("over_static")]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dense", type=Path, nargs="?", help="checkpoint folder")
    parser.add_argument("--train", type=Path, nargs="+", default=[], help="text to fit on")
    parser.add_argument("--valid", nargs="+", default=[], metavar="NAME=FILE", help="to report on")
    parser.add_argument("--work", type=Path, help="folder for fits and losses")
    parser.add_argument("--tokens", type=int, default=5120, help="of each domain (default 5120)")
    parser.add_argument("--train-tokens", type=int, default=16384, help="(default 16384)")
    parser.add_argument("--steps", type=int, default=500, help="of each router (default 500)")
    parser.add_argument("--dtype", default="bfloat16", help="to measure in (default bfloat16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="every combination")
    parser.add_argument("--only", default="", metavar="PATTERN", help="settings to measure")
    parser.add_argument("--fit-only", action="store_true", help="measure nothing yet")
    parser.add_argument("--run", default=time.strftime("%Y-%m-%d"), help="name of the run")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="show the last run")
    arguments = parser.parse_args()
    if not arguments.table and not (
        arguments.dense and arguments.train and arguments.valid and arguments.work
    ):
        parser.error("a checkpoint, --train, --valid and --work are needed")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
