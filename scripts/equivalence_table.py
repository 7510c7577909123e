"""Convert one dense checkpoint in every exact way and tabulate how far each result is from it.

    python scripts/equivalence_table.py DENSE --probe TEXT --csv scripts/bench/equivalence.csv

Each row is one `adaconvert upcycle`, verified against the dense model in float32 on the probe text:
the largest difference of any logit, relative to the largest logit, and the share of tokens with the
same most likely next token. TEXT is a text file, or JSON lines with a "text" field of which the
first document is used.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import adaconvert
from adaconvert.errors import AdaconvertError

VARIANTS: dict[str, dict[str, object]] = {
    "8 experts, top-2": {},
    "granular G=2, 8 experts, top-2": {"granularity": 2},
    "granular G=4, 16 experts, top-4": {"granularity": 4, "experts": 16, "top_k": 4},
    "granular G=2, router in float32": {"granularity": 2, "target": "ernie4_5_moe"},
    "shared + routed split": {"shared_experts": "split"},
    "shared + routed split, Qwen2-MoE": {"shared_experts": "split", "target": "qwen2_moe"},
    "neutral shared expert, Qwen2-MoE": {"shared_experts": "neutral", "target": "qwen2_moe"},
    "upper half of the layers": {"layers": "15-29", "target": "qwen2_moe"},
}
FIELDS = (
    "variant",
    "host",
    "class",
    "gigabytes",
    "tokens",
    "relative",
    "argmax_agreement",
    "broken_groups",
    "model",
    "commit",
    "transformers",
    "torch",
)


def commit() -> str:
    """Return the commit the working tree stands at."""
    folder = Path(__file__).parent
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def measure(dense: Path, probe: Path, work: Path, name: str) -> dict[str, object]:
    """Return the row of one variant; a refusal is a row too."""
    out = work / "out"
    row: dict[str, object] = {"variant": name, "model": dense.name, "commit": commit()}
    row |= {package: metadata.version(package) for package in ("transformers", "torch")}
    try:
        result = adaconvert.convert(
            dense, destination=out, verify=False, overwrite=True, **VARIANTS[name]
        )
        report = adaconvert.verify(dense, out, probe=probe)
    except AdaconvertError as error:
        return row | {"class": f"refused: {error}"}
    found = report.equivalence
    assert found is not None
    splits = [s for layer in found.routing if (s := layer.split_groups_stored) is not None]
    return row | {
        "host": result.report.target,
        "class": result.report.exactness.kind,
        "gigabytes": f"{result.report.disk / 1e9:.2f}",
        "tokens": found.logits.tokens,
        "relative": f"{found.relative:.1e}",
        "argmax_agreement": f"{100 * found.logits.argmax_agreement:.1f} %",
        "broken_groups": f"{100 * sum(splits) / len(splits):.2f} %" if splits else "",
    }


def main() -> int:
    """Print a markdown table and append the rows to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dense.parent) as folder:
        work = Path(folder)
        rows = []
        for name in VARIANTS:
            rows.append(measure(args.dense, args.probe, work, name))
            print(rows[-1], file=sys.stderr)
    shown = FIELDS[:8]
    print("| " + " | ".join(shown) + " |\n|" + " --- |" * len(shown))
    for row in rows:
        print("| " + " | ".join(str(row.get(field, "")) for field in shown) + " |")
    if args.csv:
        fresh = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
