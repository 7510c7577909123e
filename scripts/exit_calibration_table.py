"""Does the promise of calibrated exits hold? Records a model once, calibrates it many times.

    python scripts/exit_calibration_table.py CKPT --data prose.valid.jsonl --max-tokens 100k

Every block is run once. Then, --resamples times, the blocks are dealt anew to the ordering, testing
and evaluation splits, and rules of leaving are tried, tested and chosen as `adaconvert calibrate
--max-disagreement` does. A row says how often the chosen rule breaks the limit on the evaluation
split and on all blocks, what it costs on average, and what the cheapest rule costs that keeps to
the limit on all blocks (the oracle's). The evaluation split is small, so a rule within the limit
can be above it there by chance; all blocks hold those that were tested as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from bench.results import append, commit, machine
from tqdm import tqdm

from adaconvert.errors import DataError
from adaconvert.evaluate.calibration_data import CalibrationData, Part, Reading, read_data
from adaconvert.evaluate.calibration_settings import CalibrationSettings
from adaconvert.evaluate.exit_records import ExitMeasurer
from adaconvert.evaluate.exit_search import ExitSearch
from adaconvert.evaluate.risk import Risk, disagreement_risk
from adaconvert.evaluate.sweep import Setting
from adaconvert.evaluate.testing_sequence import Integers, split
from adaconvert.modeling.loading import load_model

RESULTS = Path(__file__).resolve().parent / "bench" / "exit_calibration.csv"
FIELDS = (
    *("run", "commit", "versions", "cpu", "model", "data", "measure", "blocks", "tokens", "limit"),
    *("confidence", "resamples", "violations", "violations_all", "allowed", "safe", "dense"),
    *("mean_compute", "oracle_compute", "mean_gap", "sharp"),
)
NEAR = 0.05


class Again(ExitSearch):
    """A calibration on another division of blocks that were recorded already."""

    def __init__(
        self, runs: ExitMeasurer, data: CalibrationData, settings: CalibrationSettings, risk: Risk
    ) -> None:
        super().__init__(runs.model, data, settings, risk)
        self._runs = self._measurer = runs

    def cost_and_risk(self, select: Mapping[str, Any], part: Part) -> tuple[float, float]:
        """Return what a rule costs and risks on a split."""
        setting = Setting(rule="exits", name="exits", select=dict(select))
        found = self._runs.measure(setting, part.blocks)
        return found.compute, float(self._losses.risks(part, found).mean())

    def oracle(self) -> float:
        """Return the smallest compute within the limit, of the rules tried on the ordering split.

        No exit is within it always.
        """
        self._try_all()
        assert self.risk is not None
        pairs = zip(self._computes(), self._ordering_risks(), strict=True)
        return min([self.whole, *(cost for cost, risk in pairs if risk <= self.risk.limit)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """What was chosen: compute, risk on the evaluation split, risk on all blocks, [resamples]."""

    computes: Any
    held_out: Any
    everywhere: Any


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", multiple=True, required=True, help="text that trained no exit")
@click.option("--length", default=256, show_default=True, help="tokens of a block")
@click.option("--max-tokens", type=int)
@click.option("--batch", type=int, help="blocks run together")
@click.option("--measure", help="of confidence  [default: as configured]")
@click.option(
    "--limit",
    "limits",
    multiple=True,
    type=float,
    default=(0.05,),
    show_default=True,
    help="share of tokens that may differ; a row for each",
)
@click.option("--per-layer", is_flag=True, help="also try a threshold of its own for each exit")
@click.option("--confidence", default=0.95, show_default=True)
@click.option("--resamples", default=1000, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--name", help="of the model in the row  [default: its folder's]")
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
def main(
    checkpoint: Path,
    data: tuple[str, ...],
    length: int,
    max_tokens: int | None,
    batch: int | None,
    measure: str | None,
    limits: tuple[float, ...],
    per_layer: bool,
    confidence: float,
    resamples: int,
    device: str,
    name: str | None,
    csv: Path,
) -> None:
    """Record the blocks, resample, and add the row."""
    reading = Reading(data=data, length=length, max_tokens=max_tokens, unit="block")
    settings = CalibrationSettings(
        reading=reading,
        max_disagreement=limits[0],
        confidence=confidence,
        per_layer=per_layer,
        measure=measure,
        batch_size=batch,
    )
    settings.check()
    model = load_model(checkpoint, device=device)
    read = read_data(reading, checkpoint, settings.shares)
    used = np.concatenate([p.blocks for p in (read.ordering, read.testing, read.evaluation)])
    measure = measure or str(model.adaptive_runtime.exits["decide"]["measure"])
    runs = ExitMeasurer(model, read.blocks, measure=measure, batch=batch)
    if runs.frozen:
        raise click.UsageError("with --kv propagate every rule needs a pass of its own")
    runs.records(used)
    everything = replace(read, ordering=part_of(used))
    facts = machine()
    known = {
        "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(RESULTS.parents[2]),
        "versions": f"torch {version('torch')}, transformers {version('transformers')}",
        "cpu": facts["cpu"],
        "model": name or checkpoint.name,
        "data": ", ".join(Path(where).name for where in data),
        "measure": measure,
        "blocks": len(used),
        "tokens": int(read.blocks.weights[used].sum()),
    }
    for limit in limits:
        risk = disagreement_risk(limit, confidence)
        best = Again(runs, everything, settings, risk).oracle()
        drawn = resampled(runs, everything, settings, risk, resamples)
        row = {**known, **judged(drawn, risk, best)}
        append(csv, row, FIELDS)
        tell(row)


def tell(row: Mapping[str, object]) -> None:
    """Say what a row holds."""
    click.echo(
        f"limit {row['limit']}: above it in {row['violations']} of draws on blocks held out, in "
        f"{row['violations_all']} on all (allowed {row['allowed']}); compute "
        f"{row['mean_compute']}, oracle {row['oracle_compute']}, gap {row['mean_gap']}; "
        f"no exit chosen in {row['dense']}"
    )


def part_of(blocks: Integers) -> Part:
    """Return a split whose units are these blocks."""
    return Part(blocks=blocks, members=np.arange(len(blocks)), units=len(blocks))


def resampled(
    runs: ExitMeasurer,
    everything: CalibrationData,
    settings: CalibrationSettings,
    risk: Risk,
    resamples: int,
) -> Draws:
    """Return what calibration chooses on many divisions of all blocks."""
    found: list[Sequence[float]] = []
    blocks = everything.ordering.blocks
    for seed in tqdm(range(resamples), desc="resamples"):
        parts = split(len(blocks), seed=seed, shares=settings.shares)
        data = replace(
            everything,
            ordering=part_of(blocks[parts.ordering]),
            testing=part_of(blocks[parts.testing]),
            evaluation=part_of(blocks[parts.evaluation]),
        )
        search = Again(runs, data, settings, risk)
        try:
            said = search.run()
        except DataError:
            # too few blocks to certify anything: no exit is chosen
            found.append((search.whole, 0.0, 0.0))
            continue
        assert said.chosen is not None
        select = said.rows[said.chosen].select
        held_out = search.cost_and_risk(select, data.evaluation)[1]
        found.append((*search.cost_and_risk(select, everything.ordering), held_out))
    computes, everywhere, held_out = np.array(found).T
    return Draws(computes=computes, held_out=held_out, everywhere=everywhere)


def judged(drawn: Draws, risk: Risk, best: float) -> dict[str, object]:
    """Return the part of a row that says whether calibration is safe and sharp."""
    resamples = len(drawn.computes)
    allowed = risk.level + 2 * math.sqrt(risk.level * risk.confidence / resamples)
    above = float(np.mean(drawn.everywhere > risk.limit))
    gap = float(np.abs(drawn.computes - best).mean())
    return {
        "limit": f"{risk.limit:g}",
        "confidence": f"{risk.confidence:g}",
        "resamples": resamples,
        "violations": f"{np.mean(drawn.held_out > risk.limit):.4f}",
        "violations_all": f"{above:.4f}",
        "allowed": f"{allowed:.4f}",
        "safe": "yes" if above <= allowed else "no",
        "dense": f"{np.mean(drawn.everywhere == 0):.4f}",
        "mean_compute": f"{drawn.computes.mean():.4f}",
        "oracle_compute": f"{best:.4f}",
        "mean_gap": f"{gap:.4f}",
        "sharp": "yes" if gap <= NEAR else "no",
    }


if __name__ == "__main__":
    main()
