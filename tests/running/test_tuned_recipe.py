"""The recipe that tunes single neurons while a quarter of them runs, on a tiny model: what it was
trained with is what the result does without being asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from adaconvert import api
from adaconvert.io import manifest
from adaconvert.modeling.loading import load_model
from adaconvert.recipe.load import load

NAME = "moefy/smollm2-135m-tuned"
#: of the tiny model's 64 neurons.
QUARTER = {"rule": "top-k", "k": 16}


def settings_of(bench: Any) -> list[str]:
    """Return settings for a tiny run."""
    train, valid = bench.folder / "train.jsonl", bench.folder / "valid.jsonl"
    return [
        *(f"data.{name}={train}" for name in ("train", "calibrate")),
        f"data.valid={valid}",
        *("tune.tokens=", "tune.steps=2", "tune.seq_len=16", "tune.batch_size=2"),
        "tune.select=rule=top-k,k=16",
        *("calibrate.values=[8,16,48]", "calibrate.budget=0.91", "calibrate.length=16"),
        *("calibrate.unit=block", "evaluate.length=16", "evaluate.speed=false"),
        "evaluate.select=[rule=all]",
    ]


def sites_of(folder: Path) -> list[dict[str, Any]]:
    """Return how every feed-forward network of a checkpoint is split and selected from."""
    adaptive = json.loads((folder / "config.json").read_text())["adaptive"]
    return [slots["ffn"] for slots in adaptive["sites"].values()]


def test_what_it_was_trained_with_is_what_the_result_does(bench: Any) -> None:
    out = Path(bench.folder / "out")
    done = api.run(NAME, bench.folder / "dense", out, settings=settings_of(bench))
    assert [stage.status for stage in done.stages] == [*["done"] * 4, "left out"]
    for site in sites_of(out):
        assert (site["experts"], site["router"]["kind"]) == ({"count": 64, "width": 1}, "gate")
        assert site["select"] == QUARTER
    tuned = bench.folder / ".out.run" / "dense-tune"
    # training changes no selection by itself; calibrating does
    assert [site["select"] for site in sites_of(tuned)] == [{"rule": "top-k", "k": 64}] * 2
    record: Any = manifest.read(tuned)
    assert record["options"]["select"] == QUARTER
    table = json.loads((out / "config.json").read_text())["adaptive"]["calibration"]
    assert table["rows"][table["chosen"]]["select"] == {"*": QUARTER}
    card = (out / "README.md").read_text()
    assert "| compute | loss |" in card
    assert all(f"{stage.verb}:" in card for stage in load(NAME).stages)
    _check_knob(out, table["rows"][table["chosen"]]["compute"])


def _check_knob(folder: Path, compute: float) -> None:
    """The default is the chosen row; the knob turns it up to every neuron."""
    model: Any = load_model(folder)
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        default = model(input_ids=ids).logits
        with model.set_select("top-k", k=16):
            assert torch.equal(model(input_ids=ids).logits, default)
        with model.set_compute(compute):
            assert torch.equal(model(input_ids=ids).logits, default)
        with model.set_compute(1.0):
            assert not torch.equal(model(input_ids=ids).logits, default)
