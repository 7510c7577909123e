"""Calibration of blocks that tokens skip, on tiny models with random routers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaconvert import api
from adaconvert.data.text import read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.errors import OptionError
from adaconvert.evaluate.applied import applied
from adaconvert.evaluate.calibration_output import configured
from adaconvert.evaluate.sweep import ALL
from adaconvert.modeling.adaptive_knobs import DEPTH
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.calibrating import OPTIONS
from adaconvert.testing.depth_by_hand import depth_by_hand


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipping")
    dense = tiny_models.make("llama", folder / "dense", layers=4, max_shard_size="1GB")
    made = depth_by_hand(dense, folder / "skip", (1, 2))
    # what it costs is a fraction of the dense model's FLOPs, which are this many
    config = json.loads((made / "config.json").read_text())
    model = load_model(made)
    length = config["adaptive"]["reference"]["length"]
    with model.set_depth("all"), model.account() as account, torch.no_grad():
        model(input_ids=torch.arange(5, 5 + length)[None])
    config["adaptive"]["reference"]["flops_per_token"] = round(account.flops_per_token()["total"])
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_budget_is_kept(skipping: Path, text: Path, tmp_path: Path, per_layer: bool) -> None:
    out = tmp_path / "out"
    found = api.calibrate(
        skipping, text, destination=out, budget=0.8, per_layer=per_layer, **OPTIONS
    )
    assert found.chosen is not None
    assert found.rows[found.chosen].compute <= 0.8
    # the whole model is a row as well, and what anything is compared with
    assert found.rows[-1].compute == 1
    assert found.rows[-1].changed == 0
    model = load_model(out)
    blocks = token_blocks(read_documents(str(text), max_documents=4), out, length=32, seed=0)
    ids = torch.from_numpy(np.asarray(blocks.ids))
    with model.account() as account, torch.no_grad():
        model(input_ids=ids)
    assert account.compute() == pytest.approx(found.rows[found.chosen].compute, abs=0.1)
    with model.set_compute(1.0), torch.no_grad():
        whole = model(input_ids=ids).logits
    with model.set_depth("all"), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole)
    # what was configured before comes back when nothing is chosen
    before = configured(json.loads((skipping / "config.json").read_text())["adaptive"])
    assert configured(json.loads((out / "config.json").read_text())["adaptive"]) == before


def test_a_promise_of_few_changes_is_tested(skipping: Path, text: Path, tmp_path: Path) -> None:
    found = api.calibrate(
        skipping, text, destination=tmp_path / "out", max_disagreement=0.9, **OPTIONS
    )
    assert found.chosen is not None
    chosen = found.rows[found.chosen]
    assert chosen.guaranteed
    assert chosen.compute < 1
    assert DEPTH in chosen.select


def test_settings_are_applied_and_taken_back(skipping: Path) -> None:
    model: Any = load_model(skipping)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits
        with applied(model, ALL):
            whole = model(input_ids=ids).logits
        with model.set_depth("all"):
            assert torch.equal(whole, model(input_ids=ids).logits)
        assert torch.equal(own, model(input_ids=ids).logits)
    assert not torch.equal(own, whole)


def test_options_about_experts_are_refused(skipping: Path, text: Path, tmp_path: Path) -> None:
    for options in ({"rules": ("top-k",)}, {"measure": "max"}):
        with pytest.raises(OptionError, match="tokens skip alone"):
            api.calibrate(
                skipping, text, destination=tmp_path / "out", budget=0.8, **options, **OPTIONS
            )
