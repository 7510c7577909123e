"""Measures balanced clustering against k-means-constrained and against a random split.

    pip install k-means-constrained
    python scripts/bench_clustering.py DENSE --layers 0,14,29

DENSE is a folder with the safetensors of a dense Llama-like model, whose gate rows are clustered at
unit length. Matrices of 3072 x 768 are made from its weights, from normal numbers and from a
mixture of 600 normal clusters, and cut into 512; one of 14336 x 4096 is cut by ours alone. The runs
of a case alternate (ours, theirs, ours), so that slow phases of the machine hit both. Nothing is
asserted: rows are added to a CSV file and the table of this run is printed. "gain" is how much
lower the sum of squares is than that of random clusters of the same size, the mean of five;
"peak_mib" what the process held at most beyond what it held before, features included there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench import results
from numpy.typing import NDArray
from safetensors import safe_open

from adaconvert.clustering.balanced import balanced_kmeans
from adaconvert.clustering.splits import unit_rows

SCRIPTS = Path(__file__).resolve().parent
RESULTS = SCRIPTS / "bench" / "clustering.csv"
PEER = "k-means-constrained"
FIELDS = (
    *("run", "commit", "versions", "cpu", "cores", "memory_gib", "kernel", "python"),
    *("threads", "case", "points", "coordinates", "clusters", "method", "round"),
    *("wall_s", "cpu_s", "peak_mib", "gain", "gain_per_point"),
)
Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A matrix, the number of clusters to cut it into, and whether the peer does it too."""

    name: str
    rows: Matrix
    clusters: int
    peer: bool = True


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("dense", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--layers", default="0,14,29", show_default=True, help="whose gates are clustered")
@click.option("--clusters", default="16,48,128,256", show_default=True, help="for those layers")
@click.option("--big/--no-big", default=True, help="14336 x 4096 at 512 clusters, ours alone")
@click.option("--peer/--no-peer", default=True, help="k-means-constrained, where installed")
@click.option("--csv", "path", type=click.Path(path_type=Path), default=RESULTS, show_default=False)
def main(dense: Path, layers: str, clusters: str, big: bool, peer: bool, path: Path) -> None:
    """Run all cases, add their rows to the file and print a table."""
    peer = peer and util.find_spec("k_means_constrained") is not None
    numbers = [int(layer) for layer in layers.split(",")]
    common = facts(peer)
    balanced_kmeans(np.eye(64, dtype=np.float32), 8)
    click.echo("| case | clusters | ours s | theirs s | times | gain ours / theirs |")
    click.echo("| --- | --- | --- | --- | --- | --- |")
    for case in cases(dense, numbers, [int(count) for count in clusters.split(",")], big=big):
        rows = measure(case, peer=peer and case.peer)
        for row in rows:
            results.append(path, common | row, FIELDS)
        click.echo(line(case, rows))


def facts(peer: bool) -> dict[str, str]:
    """Return what every row of this run says."""
    packages = ["adaconvert", "torch", "numpy", *([PEER] if peer else [])]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return results.machine() | {
        "run": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": results.commit(SCRIPTS.parent),
        "versions": versions,
        "threads": str(torch.get_num_threads()),
    }


def cases(dense: Path, layers: list[int], clusters: list[int], *, big: bool) -> Iterator[Case]:
    """Yield every case; matrices are made when they are asked for."""
    for layer in layers:
        rows = weights(dense, layer, "gate_proj")
        for count in clusters:
            yield Case(name=f"layer {layer}, gate", rows=unit_rows(rows), clusters=count)
    wide = np.concatenate(
        [
            np.concatenate([weights(dense, layer, f"{name}_proj") for name in ("gate", "up")], 1)
            for layer in layers
        ]
    )
    yield Case(name="weights", rows=unit_rows(wide[:3072, :768]), clusters=512)
    generator = np.random.default_rng(0)
    normal = generator.standard_normal((3072, 768), dtype=np.float32)
    yield Case(name="normal", rows=unit_rows(normal), clusters=512)
    yield Case(name="mixture", rows=mixture(3072, 768, 600), clusters=512)
    if big:
        yield Case(name="mixture", rows=mixture(14336, 4096, 700), clusters=512, peer=False)


def weights(dense: Path, layer: int, name: str) -> Matrix:
    """Return one matrix of a layer's feed-forward network."""
    tensor = f"model.layers.{layer}.mlp.{name}.weight"
    for path in sorted(dense.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if tensor in set(file.keys()):
                return np.asarray(file.get_tensor(tensor).float().numpy())
    raise click.ClickException(f"{dense.name} has no tensor {tensor}")


def mixture(points: int, coordinates: int, centres: int) -> Matrix:
    """Return unit rows [points, coordinates] of overlapping normal clusters, uneven in size."""
    generator = np.random.default_rng(0)
    means = generator.standard_normal((centres, coordinates), dtype=np.float32)
    rows = generator.standard_normal((points, coordinates), dtype=np.float32)
    rows += 0.6 * means[generator.integers(0, centres, points)]
    return unit_rows(rows)


def measure(case: Case, *, peer: bool) -> list[dict[str, str]]:
    """Return a row per run of one case."""
    width = len(case.rows) // case.clusters
    labels = np.repeat(np.arange(case.clusters), width)
    shuffled = [np.random.default_rng(seed).permutation(labels) for seed in range(5)]
    chance = statistics.mean(spread(case, labels) for labels in shuffled)
    runs: list[tuple[str, Callable[[Case], NDArray[Any]]]] = [("balanced_kmeans", ours)]
    runs += [(PEER, theirs), ("balanced_kmeans", ours)] if peer else []
    rows = []
    for number, (method, run) in enumerate(runs, 1):
        # 5 resets the highest mark
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
        labels = run(case)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        held = memory("VmHWM") - before
        gain = chance - spread(case, labels)
        rows.append(
            {
                "case": case.name,
                "points": str(case.rows.shape[0]),
                "coordinates": str(case.rows.shape[1]),
                "clusters": str(case.clusters),
                "method": method,
                "round": str(number),
                "wall_s": f"{wall:.3f}",
                "cpu_s": f"{cpu:.3f}",
                "peak_mib": f"{held:.0f}",
                "gain": f"{gain:.3f}",
                "gain_per_point": f"{gain / len(case.rows):.5f}",
            }
        )
    return rows


def ours(case: Case) -> NDArray[Any]:
    """Return labels by this project."""
    return balanced_kmeans(case.rows, case.clusters)


def theirs(case: Case) -> NDArray[Any]:
    """Return labels by minimum-cost flow."""
    from k_means_constrained import KMeansConstrained

    width = len(case.rows) // case.clusters
    found = KMeansConstrained(
        case.clusters, size_min=width, size_max=width, n_init=1, max_iter=20, random_state=0
    ).fit(case.rows)
    return np.asarray(found.labels_)


def spread(case: Case, labels: NDArray[Any]) -> float:
    """Return the sum of squared distances to the means; all clusters must be equally large."""
    width = len(case.rows) // case.clusters
    if (np.bincount(labels, minlength=case.clusters) != width).any():
        raise click.ClickException(f"{case.name}: clusters differ in size")
    members = np.argsort(labels, kind="stable").reshape(case.clusters, width)
    sums = np.stack([case.rows[cluster].sum(axis=0, dtype=np.float64) for cluster in members])
    squares = float(np.einsum("ij,ij->", case.rows, case.rows, dtype=np.float64))
    return squares - float((sums**2).sum()) / width


def memory(field: str) -> float:
    """Return how much memory this process holds (VmRSS) or held at most (VmHWM), in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) / 2**10


def line(case: Case, rows: list[dict[str, str]]) -> str:
    """Return one case as a line of the table."""
    mine = [row for row in rows if row["method"] != PEER]
    other = [row for row in rows if row["method"] == PEER]
    seconds = statistics.mean(float(row["wall_s"]) for row in mine)
    gain = float(mine[0]["gain"])
    cells = [
        f"{case.name}, {case.rows.shape[0]} x {case.rows.shape[1]}",
        str(case.clusters),
        f"{seconds:.2f}",
        f"{float(other[0]['wall_s']):.2f}" if other else "",
        f"{float(other[0]['wall_s']) / seconds:.1f}" if other else "",
        f"{gain / float(other[0]['gain']):.3f}" if other else "",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
