"""What models that spend less depth lose, as rows and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.depth_models import DENSE, SEARCHED

FIELDS = (
    *("run", "commit", "cpu", "model", "seed", "case", "level", "train", "tokens", "lr"),
    *("router_lr", "trained", "dropped", "compute", "runs", "loss_before", "loss", "loss_top_k"),
    *("over_dense", "over_searched"),
)
Row = dict[str, object]


def rows(found: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Yield a row for every run.

    Args:
        found: {"case", "level", "lr", "dropped", "compute" where the run does not measure it, and
            "run": "training" of its manifest}.
    """
    dense = [_loss(one) for one in found if one["case"] == DENSE]
    for one in found:
        run, first, last = one["run"], one["run"]["validation"][0], one["run"]["validation"][-1]
        rivals = [
            _loss(other)
            for other in found
            if other["case"] == SEARCHED and other["level"] == one["level"]
        ]
        options = run["options"]
        yield {
            "seed": options["seed"],
            "case": one["case"],
            "level": one["level"],
            "train": "+".join(options["train"]),
            "tokens": run["tokens"],
            "lr": f"{one['lr']:g}",
            "router_lr": "" if options["router_lr"] is None else f"{options['router_lr']:g}",
            "trained": run["trained"],
            "dropped": one["dropped"],
            "compute": f"{last.get('compute', one['compute']):.4f}",
            "runs": f"{last['run']:.4f}" if "run" in last else "",
            "loss_before": f"{first['loss']:.5f}",
            "loss": f"{last['loss']:.5f}",
            "loss_top_k": f"{last['top_k']:.5f}" if "top_k" in last else "",
            "over_dense": f"{last['loss'] - min(dense):.5f}" if dense else "",
            "over_searched": f"{last['loss'] - min(rivals):.5f}" if rivals else "",
        }


def _loss(one: Mapping[str, Any]) -> float:
    found: float = one["run"]["validation"][-1]["loss"]
    return found


def table(made: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yield a Markdown table of the best run of every case at every level."""
    yield "| compute | model | trained | compute reached | loss | over dense | over searched |"
    yield "| ---: | --- | --- | ---: | ---: | ---: | ---: |"
    for level in dict.fromkeys(row["level"] for row in made):
        here = [row for row in made if row["level"] == level]
        for case, train in dict.fromkeys((row["case"], row["train"]) for row in here):
            mine = [row for row in here if (row["case"], row["train"]) == (case, train)]
            best = min(mine, key=lambda row: float(str(row["loss"])))
            ahead = f" (top-k, optimistic: {best['loss_top_k']})" if best["loss_top_k"] else ""
            yield (
                f"| {level} | {case} | {train} | {best['compute']} | {best['loss']}{ahead} "
                f"| {best['over_dense']} | {best['over_searched']} |"
            )
