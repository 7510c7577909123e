"""Calibrating exits: what is recorded is what the runtime does, and what is chosen is obeyed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert import api
from adaconvert.data.text import read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.errors import OptionError, SourceError
from adaconvert.evaluate import calibration_output
from adaconvert.evaluate.exit_records import ExitMeasurer, Record, exits_taken
from adaconvert.evaluate.sweep import ALL, Measurer, Setting
from adaconvert.modeling.adaptive_knobs import EXITS
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.calibrating import OPTIONS, table, teach
from adaconvert.testing.exits_by_hand import by_hand

PLACES = (1, 2)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that knows the language, with exits nobody has trained."""
    folder = tmp_path_factory.mktemp("left")
    dense = tiny_models.make("llama", folder / "dense", layers=3, max_shard_size="1GB")
    teach(dense, 600)
    return by_hand(dense, folder / "exits", PLACES, "norm")


def rule_of(measure: str, thresholds: list[float | None], patience: int | None = None) -> Any:
    return {
        "measure": measure,
        "thresholds": thresholds,
        "decay": None,
        "patience": patience,
        "kv": "recompute",
    }


def setting_of(rule: Any) -> Setting:
    return Setting(rule="exits", name="exits", select={**ALL, EXITS: rule})


@pytest.mark.parametrize(
    "rule",
    [
        rule_of("max", [0.3, 0.2]),
        rule_of("difference", [None, 0.05]),
        rule_of("entropy", [0.2, 0.1]),
        rule_of("state", [None, 0.5]),
        rule_of("patience", [None, None], 1),
        {**rule_of("max", [0.4, 0.3]), "decay": {"rate": 4.0, "length": 32}},
    ],
    ids=lambda rule: f"{rule['measure']}{'-decay' if rule['decay'] else ''}",
)
def test_one_recorded_pass_says_what_a_pass_with_the_rule_does(
    left: Path, text: Path, rule: Any
) -> None:
    model = load_model(left)
    documents = read_documents(str(text), max_documents=6)
    blocks = token_blocks(documents, left, length=32, seed=0)
    chosen = np.arange(len(blocks))
    found = ExitMeasurer(model, blocks, measure=rule["measure"]).measure(setting_of(rule), chosen)
    run = Measurer(model, blocks).measure(setting_of(rule), chosen)
    np.testing.assert_allclose(found.loss, run.loss, rtol=1e-5)
    np.testing.assert_allclose(found.changed, run.changed)
    assert found.compute == pytest.approx(run.compute, rel=1e-12)
    assert found.compute != 1.0


def test_a_token_takes_the_first_exit_strictly_above_its_threshold() -> None:
    sure = np.array([[0.5, 0.9], [0.6, 0.1], [0.1, 0.2]], dtype=np.float32)
    none = np.zeros((3, 3))
    record = Record(sure=sure, tops=none.astype(np.int32), losses=none)
    assert exits_taken(rule_of("max", [0.5, 0.3]), [0, 1], record).tolist() == [1, 0, 2]
    assert exits_taken(rule_of("max", [None, None]), [0, 1], record).tolist() == [2, 2, 2]


def test_a_calibrated_checkpoint_leaves_as_its_table_says(
    left: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = api.calibrate(left, text, destination=out, budget=0.99, per_layer=True, **OPTIONS)
    assert said.chosen is not None
    row = table(out)["calibration"]["rows"][said.chosen]
    assert table(out)["model"]["exits"]["decide"]["thresholds"] == row["exits"]["thresholds"]
    assert calibration_output.stale(out) == []
    model, ids = load_model(out), torch.arange(5, 25)[None]
    assert model.adaptive_runtime.leaving()["thresholds"] == row["exits"]["thresholds"]
    with model.set_compute(1.0):
        assert model.adaptive_runtime.leaving() is None
        whole = model(input_ids=ids).logits
    assert torch.equal(whole, load_model(left)(input_ids=ids).logits)
    for each in table(out)["calibration"]["rows"]:
        if "exits" in each and each["compute"] < 1:
            with model.set_compute(each["compute"]):
                found = model.adaptive_runtime.leaving()
            assert found is None or found["measure"] == each["exits"]["measure"]
    again = api.calibrate(out, text, destination=tmp_path / "again", **OPTIONS)
    assert again.chosen is None
    assert table(tmp_path / "again")["model"]["exits"] == table(left)["model"]["exits"]


def test_exits_that_know_nothing_are_never_taken(left: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = api.calibrate(left, text, destination=out, max_disagreement=0.06, **OPTIONS)
    promised = [row for row in said.rows if row.guaranteed]
    assert promised
    assert all(row.changed <= 0.06 or row.compute == 1 for row in promised)


def test_experts_beside_exits_are_refused(text: Path, left: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="about experts"):
        api.calibrate(left, text, destination=tmp_path / "out", rules=("top-k",), **OPTIONS)


def test_evaluate_tells_how_good_each_exit_is(left: Path, text: Path) -> None:
    said = api.evaluate(left, data=text, length=32, max_documents=5, speed=False)
    assert [row["blocks"] for row in said.exits] == [1, 2, 3]
    assert said.exits[-1]["agreement"] == 1.0
    # a round of n drafts gives 1 + a + ... + a^n tokens
    first = said.exits[0]
    chance, drafts = first["agreement"], first["drafts"]
    assert first["drafts_gain"] < sum(chance**power for power in range(drafts + 1))
    assert "drafts_gain" not in said.exits[-1]
    loss = said.results[0].loss
    assert loss is not None
    assert said.exits[-1]["loss"] == pytest.approx(loss.value, rel=1e-4)
    assert any(line.startswith("exits, by the blocks") for line in said.lines())


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_evaluate_counts_where_tokens_leave(
    kv: str, left: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "leaving"
    shutil.copytree(left, folder)
    config = json.loads((folder / "config.json").read_text())
    exits = config["adaptive"]["model"]["exits"]
    exits["kv"], exits["decide"]["thresholds"] = kv, [0.3, 0.2]
    (folder / "config.json").write_text(json.dumps(config))
    said = api.evaluate(folder, data=text, length=32, max_documents=5, speed=False)
    model = load_model(folder)
    blocks = token_blocks(read_documents(str(text), max_documents=5), folder, length=32, seed=0)
    with torch.inference_mode():
        depth = torch.cat(
            [
                model(torch.from_numpy(ids[:size])[None]).exit_layers[0]
                for ids, size in zip(blocks.ids, blocks.weights.sum(axis=1), strict=True)
            ]
        )
    assert 0 < int((depth < 3).sum()) < len(depth)
    for row in said.exits:
        assert row["share"] == pytest.approx(float((depth == row["blocks"]).float().mean()))
    mean = f"tokens run {depth.float().mean():.2f} blocks on average"
    assert any(mean in line for line in said.lines())


@pytest.mark.parametrize("fault", ["nan", "inf"])
def test_heads_that_compute_no_numbers_are_named(
    fault: str, left: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(left, folder)
    held = load_file(folder / "model.safetensors")
    held["exits.2.norm.weight"][0] = float(fault)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    for run in (
        lambda: api.evaluate(folder, data=text, length=32, max_tokens=64, speed=False),
        lambda: api.calibrate(folder, text, destination=tmp_path / "x", budget=0.9, **OPTIONS),
    ):
        with pytest.raises(SourceError, match=r"exits\.2: the exit after 2 blocks computes"):
            run()
    # the whole model is not at fault, and can still be run
    assert torch.isfinite(load_model(folder)(torch.arange(5)[None]).logits).all()
