"""What calibrated exits promise: on losses that are made up, and of tiny models that classify."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert import api
from adaconvert.data.text import read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.evaluate import calibration_output
from adaconvert.evaluate.exit_records import ExitMeasurer, Record, exits_taken
from adaconvert.evaluate.risk import Floats, disagreement_risk
from adaconvert.evaluate.sweep import ALL, Measurer, Setting
from adaconvert.evaluate.testing_sequence import Certified, certify, split
from adaconvert.modeling.adaptive_knobs import EXITS
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.calibrating import OPTIONS
from adaconvert.testing.exits_by_hand import by_hand
from adaconvert.testing.labelled import texts_with_exits
from adaconvert.testing.tiny_images import save_images

LEVELS = tuple(float(level) for level in np.linspace(0.99, 0.05, 24))
BLOCKS_BEFORE = np.array([1, 2, 3])
RISK = disagreement_risk(0.05)


def rule_of(level: float | None, measure: str = "max", patience: int | None = None) -> Any:
    return {
        "measure": measure,
        "thresholds": [level, level],
        "decay": None,
        "patience": patience,
        "kv": "recompute",
    }


def made_up(rng: np.random.Generator, count: int, *, wrong: float | None = None) -> list[Record]:
    """Return records of blocks of 16 tokens: exits are wrong as often as they say, or `wrong`."""
    found = []
    for _ in range(count):
        sure = np.sort(rng.beta(4, 1, (16, 2)), axis=1).astype(np.float32)
        often = 1 - sure if wrong is None else np.full(sure.shape, wrong)
        tops = np.concatenate([rng.random((16, 2)) < often, np.zeros((16, 1))], axis=1)
        losses = np.zeros((16, 3), dtype=np.float32)
        found.append(Record(sure=sure, tops=tops.astype(np.int32), losses=losses))
    return found


def tables(records: list[Record]) -> tuple[Floats, Floats]:
    """Return compute of each level, and its risk on each block."""
    computes, risks = [], []
    for level in LEVELS:
        taken = [exits_taken(rule_of(level), [0, 1], record) for record in records]
        computes.append(float(np.mean([BLOCKS_BEFORE[one].mean() for one in taken])) / 3)
        rows = np.arange(16)
        risks.append(
            [
                float((record.tops[rows, one] != record.tops[:, -1]).mean())
                for record, one in zip(records, taken, strict=True)
            ]
        )
    return np.array(computes), np.array(risks)


def certified(computes: Floats, risks: Floats, seed: int) -> Certified:
    parts = split(risks.shape[1], seed=seed)
    ordering = [row[parts.ordering] for row in risks]
    return certify(computes, ordering, lambda s: risks[s][parts.testing], RISK)


def test_exits_that_are_always_wrong_are_never_certified() -> None:
    records = made_up(np.random.default_rng(0), 200, wrong=1.0)
    computes, risks = tables(records)
    # so careful a rule that no token leaves costs nothing and is no exit
    leaves = computes < 1
    assert certified(computes[leaves], risks[leaves], 0).passed == ()


def test_certified_rules_break_the_limit_no_oftener_than_allowed() -> None:
    computes, risks = tables(made_up(np.random.default_rng(1), 4000))
    true = risks.mean(axis=1)
    assert true.min() <= RISK.limit < true.max()
    rng = np.random.default_rng(2)
    broken, passed, draws = 0, 0, 300
    for draw in range(draws):
        chosen = rng.integers(risks.shape[1], size=300)
        found = certified(computes, risks[:, chosen], draw)
        passed += bool(found.passed)
        broken += any(true[setting] > RISK.limit for setting in found.passed)
    assert passed > draws / 2
    allowed = RISK.level + 3 * math.sqrt(RISK.level * (1 - RISK.level) / draws)
    assert broken / draws <= allowed


def test_lower_thresholds_never_raise_the_depth() -> None:
    for record in made_up(np.random.default_rng(3), 20):
        taken = [exits_taken(rule_of(level), [0, 1], record) for level in (None, *LEVELS)]
        assert (np.diff(np.array(taken), axis=0) <= 0).all()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    dense = tiny_models.make("llama", folder / "dense", layers=3, max_shard_size="1GB")
    return by_hand(dense, folder / "exits", (1, 2), "norm")


def test_patience_with_thresholds_is_recorded_as_it_runs(plain: Path, text: Path) -> None:
    model = load_model(plain)
    blocks = token_blocks(read_documents(str(text), max_documents=4), plain, length=32, seed=0)
    chosen, runs = np.arange(len(blocks)), ExitMeasurer(model, blocks, measure="patience")
    sure = np.concatenate([record.sure[:, 1] for record in runs.records(chosen)])
    level = float(np.clip(np.median(sure), 0, 1))
    rule = rule_of(level, "patience", 1)
    setting = Setting(rule="exits", name="exits", select={**ALL, EXITS: rule})
    found, run = runs.measure(setting, chosen), Measurer(model, blocks).measure(setting, chosen)
    np.testing.assert_allclose(found.changed, run.changed)
    assert found.compute == pytest.approx(run.compute, rel=1e-12)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "exits.1.norm.weight"])
def test_a_table_is_stale_once_weights_or_heads_change(
    plain: Path, text: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    api.calibrate(plain, text, destination=out, budget=0.99, **OPTIONS)
    assert calibration_output.stale(out) == []
    (file,) = (path for path in out.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(file)
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert calibration_output.stale(out)


def images_with_exits(root: Path) -> Path:
    dense = tiny_models.make("vit", root / "dense", layers=3, max_shard_size="1GB")
    return by_hand(dense, root / "exits", (1, 2), "norm")


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_classifiers_keep_their_promise(kind: str, text: Path, tmp_path: Path) -> None:
    if kind == "vit":
        made, data = images_with_exits(tmp_path), tmp_path / "images"
        save_images(data, ("LABEL_0", "LABEL_1", "LABEL_2"), 40)
    else:
        made, data = texts_with_exits(tmp_path), text
    out = tmp_path / "out"
    said = api.calibrate(made, data, destination=out, max_disagreement=0.3, **OPTIONS)
    assert said.chosen is not None
    assert all(row.changed <= 0.5 for row in said.rows if row.guaranteed)
    assert calibration_output.stale(out) == []
    stored = json.loads((out / "config.json").read_text())["adaptive"]
    rule = stored["calibration"]["rows"][said.chosen].get("exits")
    wanted = [None, None] if rule is None else rule["thresholds"]
    assert stored["model"]["exits"]["decide"]["thresholds"] == wanted
    assert torch.is_tensor(next(load_model(out).parameters()))
