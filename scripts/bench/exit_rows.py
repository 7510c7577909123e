"""What trained exits lose on held-out text, as rows and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FIELDS = (
    *("run", "commit", "cpu", "model", "seed", "case", "exit", "tokens", "lr", "exit_loss"),
    *("parameters", "whole_loss", "loss_before", "loss", "agreement_before", "agreement"),
    *("over_lens",),
)
#: what every other case is compared with.
LENS = "affine"
Row = dict[str, object]


def rows(found: Mapping[tuple[str, float], Mapping[str, Any]]) -> Iterator[Row]:
    """Yield a row for every exit of every run.

    Args:
        found: (case, learning rate) -> "training" of the manifest, with its "options".
    """
    lens = [run for (case, _), run in found.items() if case == LENS]
    for (case, lr), run in found.items():
        first, last = run["validation"][0], run["validation"][-1]
        for at, after in last["exits"].items():
            before = first["exits"][at]
            # the lens at its own best rate
            rivals = [other["validation"][-1]["exits"][at]["loss"] for other in lens]
            yield {
                "seed": run["options"]["seed"],
                "case": case,
                "exit": at,
                "tokens": run["tokens"],
                "lr": f"{lr:g}",
                "exit_loss": run["options"]["exits"]["loss"],
                "parameters": run["trained"] // len(last["exits"]),
                "whole_loss": f"{last['loss']:.5f}",
                "loss_before": f"{before['loss']:.5f}",
                "loss": f"{after['loss']:.5f}",
                "agreement_before": f"{before['agreement']:.5f}",
                "agreement": f"{after['agreement']:.5f}",
                "over_lens": f"{after['loss'] - min(rivals):.5f}" if rivals else "",
            }


def table(made: Sequence[Row]) -> Iterator[str]:
    """Yield a Markdown table of the best rate of every case at every exit."""
    yield "| exit | head | rate | loss before | loss | over the lens | agreement |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    for at in dict.fromkeys(row["exit"] for row in made):
        for case in dict.fromkeys(row["case"] for row in made):
            mine = [row for row in made if (row["exit"], row["case"]) == (at, case)]
            best = min(mine, key=lambda row: float(str(row["loss"])))
            share = float(str(best["agreement"]))
            yield (
                f"| {at} | {case} | {best['lr']} | {best['loss_before']} | {best['loss']} "
                f"| {best['over_lens']} | {share:.1%} |"
            )
    if made:
        yield f"\nThe whole model loses {made[0]['whole_loss']}."
