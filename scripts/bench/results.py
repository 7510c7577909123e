"""Rows of measurements: what they say about the machine, how they are kept, how they are shown."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
FIELDS = (
    "run",
    "commit",
    "versions",
    "cpu",
    "cores",
    "memory_gib",
    "kernel",
    "python",
    "model",
    "case",
    "cache",
    "round",
    "wall_s",
    "cpu_s",
    "anon_mib",
    "bytes",
    "exit_code",
)
Row = dict[str, str]
BASELINE = "raw write"


def machine() -> Row:
    """Return the facts about this machine that every row carries."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "memory_gib": f"{pages / 2**30:.0f}",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit(repository: Path) -> str:
    """Return the commit the repository stands at, with "+" when files differ from it, or "none"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short=10", "HEAD")
    if not head:
        return "none"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def run_of(model: str) -> Row:
    """Return what the rows of a table about a model have in common, from now on."""
    return {
        "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(REPOSITORY),
        "cpu": machine()["cpu"],
        "model": model,
    }


def keep(
    path: Path,
    rows: Iterable[Mapping[str, object]],
    shared: Mapping[str, object],
    fields: Sequence[str],
) -> list[dict[str, Any]]:
    """Add rows to the file, each with what they share, and return them."""
    found = [{**shared, **row} for row in rows]
    for row in found:
        append(path, row, fields)
    return found


def append(path: Path, row: Mapping[str, object], fields: Sequence[str] = FIELDS) -> None:
    """Add one row to the file, which gets its first line when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[Row]:
    """Return all rows of the file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[Row]) -> str:
    """Return the rows of one run as a Markdown table of medians, with ratios to the raw write.

    The ratio is the median of the rounds' own ratios, as the cases of a round run one after the
    other and share the state the disk is in.
    """
    first = rows[0]
    size = f"{first['cores']} cores, {first['memory_gib']} GiB"
    lines = [
        f"{first['model']}; {first['cpu']}, {size}, Linux {first['kernel']}; "
        f"Python {first['python']}, {first['versions']}; commit {first['commit']}, {first['run']}",
        "",
        "| case | cache | wall s (min-max) | x raw write | CPU s | anonymous MiB | GB | runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    keys = dict.fromkeys((row["case"], row["cache"]) for row in rows)
    lines += [_line(case, cache, rows) for case, cache in keys]
    return "\n".join(lines)


def last_run(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the run that was started last."""
    latest = max(row["run"] for row in rows)
    return [row for row in rows if row["run"] == latest]


def _line(case: str, cache: str, rows: Sequence[Row]) -> str:
    chosen = [row for row in rows if row["case"] == case and row["cache"] == cache]
    good = [row for row in chosen if row["exit_code"] == "0"]
    failed = f" ({len(chosen) - len(good)} failed)" if len(good) < len(chosen) else ""
    if not good:
        return f"| {case} | {cache} | failed | | | | | {len(chosen)} |"
    walls = [float(row["wall_s"]) for row in good]
    wall = f"{statistics.median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"
    ratios = _ratios(good, rows)
    ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
    cells = [
        case,
        cache,
        wall,
        ratio,
        f"{_median(good, 'cpu_s'):.2f}",
        f"{_median(good, 'anon_mib'):.0f}",
        f"{_median(good, 'bytes') / 1e9:.2f}",
        f"{len(good)}{failed}",
    ]
    return "| " + " | ".join(cells) + " |"


def _ratios(chosen: Iterable[Row], rows: Iterable[Row]) -> list[float]:
    raw = {
        (row["cache"], row["round"]): float(row["wall_s"])
        for row in rows
        if row["case"] == BASELINE
    }
    pairs = ((row, raw.get((row["cache"], row["round"]))) for row in chosen)
    return [float(row["wall_s"]) / wall for row, wall in pairs if wall]


def _median(rows: Iterable[Row], field: str) -> float:
    return statistics.median(float(row[field]) for row in rows)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
