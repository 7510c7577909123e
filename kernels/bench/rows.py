"""What a row of measurements says, and the file it goes to."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))
import results  # noqa: E402

RESULTS = BENCH / "results.csv"
#: shape of a row; what an operation has not is left empty, what is its own stands in `detail`.
SHAPE = ("tokens", "hidden", "width", "experts", "slots", "detail")
FIELDS = (
    *("run", "commit", "device", "driver", "capability", "threads", "load"),
    *("torch", "triton", "transformers", "op", "provider", "model", *SHAPE, "dtype", "direction"),
    *("rounds", "median_us", "low_us", "high_us", "baseline", "ratio", "ratio_cpu"),
    *("peak_bytes", "saved_bytes", "roofline"),
)
Row = dict[str, str]


def now() -> str:
    """Return the time stamp of a run."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def facts(device: str) -> Row:
    """Return what is true of every row of a run on this device."""
    return {
        "run": now(),
        "commit": results.commit(ROOT),
        "threads": str(torch.get_num_threads()),
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        **(_gpu() if device == "cuda" else {"device": results.machine()["cpu"]}),
    }


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to the file, with the load of the machine now.

    Raises:
        ValueError: the file has other columns.
    """
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if tuple(header) != FIELDS:
            raise ValueError(f"{path} has other columns; write to a new file")
    results.append(path, {"load": f"{os.getloadavg()[0]:.1f}", **row}, FIELDS)


def read(path: Path) -> list[Row]:
    """Return all rows of the file; none where there is no file."""
    return results.read(path) if path.exists() else []


def spread(seconds: Sequence[float]) -> Row:
    """Return the number of rounds, the median and the 20 % and 80 % quantiles in microseconds."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    values = {"median": statistics.median(seconds), "low": fifths[0], "high": fifths[3]}
    shown = {f"{name}_us": f"{value * 1e6:.1f}" for name, value in values.items()}
    return {"rounds": str(len(seconds)), **shown}


def paired(times: Sequence[float], baseline: Sequence[float]) -> str:
    """Return the median over rounds of a provider's time by the baseline's: below 1 is faster."""
    pairs = zip(times, baseline, strict=True)
    return f"{statistics.median(own / other for own, other in pairs):.3f}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu() -> Row:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        found = []
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "driver": found[0] if found else "",
        "capability": f"{major}.{minor}",
    }
