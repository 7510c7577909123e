"""What the shipped recipes will take, computed from the config of their models alone.

    python scripts/recipe_estimates.py [NAME]... [--write]

Plans every recipe whose cost is an estimate (or those named) on a checkpoint of its model that has
the true shapes and no weights, and prints `cost` as the recipe should say it. With --write the
recipes are changed; without, the exit code is 1 when one says something else.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import click

from adaconvert import api
from adaconvert.recipe import shipped
from adaconvert.recipe.load import load
from adaconvert.running.estimate import cost_of
from adaconvert.testing import stand_ins

ROOT = Path(__file__).resolve().parents[1] / "recipes"


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("names", nargs=-1)
@click.option("--write", is_flag=True, help="change the recipes")
def main(names: tuple[str, ...], write: bool) -> None:
    """Print what every recipe takes, and compare or write it."""
    differ = False
    for name in names or shipped.names():
        recipe = load(name)
        if recipe.cost["basis"] != "estimate":
            continue
        found = estimate(name, recipe.cost["machine"])
        print(f"{name}: {found['disk']}, {found['memory']}, {found['time']}")
        differ = differ or found != dict(recipe.cost)
        if write:
            put(ROOT / f"{name}.yaml", found)
    sys.exit(0 if write else int(differ))


def estimate(name: str, machine: str) -> dict[str, str]:
    """Return the cost of a shipped recipe for the model it is named after."""
    with tempfile.TemporaryDirectory() as folder:
        source = stand_ins.make(stand_ins.model_of(name), Path(folder) / "model")
        planned = api.run(name, source, Path(folder) / "result", dry_run=True)
    return cost_of(planned.outline, machine)


def put(path: Path, cost: dict[str, str]) -> None:
    """The recipe's cost says `cost`; comments stay."""
    text = path.read_text(encoding="utf-8")
    for key in ("disk", "memory", "time"):
        text = re.sub(rf'^  {key}: ".*"$', f'  {key}: "{cost[key]}"', text, flags=re.MULTILINE)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
