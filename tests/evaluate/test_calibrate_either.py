"""`calibrate --knob`: blocks that tokens skip and experts to choose in one model, one of them
calibrated while the other stays as it is."""

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
from adaconvert.errors import OptionError
from adaconvert.evaluate.calibration_output import configured
from adaconvert.evaluate.sweep import Measurer, Setting
from adaconvert.modeling.adaptive_knobs import DEPTH
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.calibrating import OPTIONS, assert_whole, table, teach

TAU = {"rule": "dynamic-k", "tau": 0.2}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of four blocks with experts in all and routers beside the middle ones, of
    which some tokens skip."""
    folder = tmp_path_factory.mktemp("both")
    dense = tiny_models.make("llama", folder / "dense", layers=4, max_shard_size="1GB")
    teach(dense, 600)
    split = make_adaptive(dense, folder / "split", router="contribution", experts=8, select=TAU)
    made = folder / "both"
    api.convert(split, destination=made, method="depth", kind="skip", layers="1-2", verify=False)
    _give_routers_a_view(made)
    return made


def _give_routers_a_view(folder: Path) -> None:
    """Make routers of blocks random, so that they differ about tokens."""
    chance = torch.Generator().manual_seed(3)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("depth.router.weight"):
                tensors[name] = torch.randn(tensor.shape, generator=chance)
        save_file(tensors, shard, metadata={"format": "pt"})
    # hand-made from here on
    (folder / "adaconvert.json").unlink()


def ids_of(folder: Path, text: Path) -> torch.Tensor:
    """Return a batch of whole blocks."""
    blocks = token_blocks(read_documents(str(text), max_documents=40), folder, length=16, seed=0)
    return torch.from_numpy(blocks.ids[blocks.weights.all(axis=1)])


def rule_of(folder: Path) -> dict[str, Any]:
    """Return how tokens skip blocks by default, by path."""
    return {
        path: slots["layer"]["select"]
        for path, slots in table(folder)["sites"].items()
        if "layer" in slots
    }


def taus_of(folder: Path) -> list[dict[str, Any]]:
    """Return how experts are chosen by default."""
    return [slots["ffn"]["select"] for slots in table(folder)["sites"].values() if "ffn" in slots]


@pytest.mark.parametrize("search", [{}, {"per_layer": True, "search": "evolve", "generations": 3}])
def test_blocks_are_calibrated_and_experts_stay(
    both: Path, text: Path, tmp_path: Path, search: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    said = api.calibrate(both, text, destination=out, budget=0.7, knob="depth", **search, **OPTIONS)
    assert said.chosen is not None
    chosen = said.rows[said.chosen]
    assert chosen.compute <= 0.7
    assert taus_of(out) == taus_of(both) == [TAU] * 4
    assert rule_of(out) != rule_of(both)
    for row in said.rows[:-1]:
        assert {path: own for path, own in row.select.items() if path.endswith("mlp")} == {
            f"model.layers.{n}.mlp": TAU for n in range(4)
        }
    assert said.rows[-1].compute == 1
    assert_whole(out)


def test_experts_are_calibrated_and_blocks_stay(both: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = api.calibrate(
        both, text, destination=out, budget=0.6, knob="experts", rules=("dynamic-k",), **OPTIONS
    )
    assert said.chosen is not None
    assert said.rows[said.chosen].compute <= 0.6
    assert rule_of(out) == rule_of(both)
    assert taus_of(out) != taus_of(both)
    kept = configured(table(both))[DEPTH]
    assert all(row.select[DEPTH] == kept for row in said.rows[:-1])
    assert DEPTH not in said.rows[-1].select
    assert "every expert, blocks as configured" in [row.name for row in said.rows]


def test_both_one_after_the_other_and_the_knob_of_compute(
    both: Path, text: Path, tmp_path: Path
) -> None:
    one, out = tmp_path / "one", tmp_path / "out"
    first = api.calibrate(both, text, destination=one, budget=0.75, knob="depth", **OPTIONS)
    said = api.calibrate(one, text, destination=out, budget=0.5, knob="experts", **OPTIONS)
    assert first.chosen is not None
    assert said.chosen is not None
    # blocks stay as the first calibration left them
    assert rule_of(out) == rule_of(one) != rule_of(both)
    model, ids = load_model(out), ids_of(out, text)
    with torch.no_grad():
        default = model(input_ids=ids).logits
        for row in said.rows[:-1]:
            with model.set_compute(row.compute), model.account() as account:
                logits = model(input_ids=ids).logits
            # other text than the table was measured on
            assert account.compute() == pytest.approx(row.compute, abs=0.1)
            if row == said.rows[said.chosen]:
                assert torch.equal(logits, default)
        with model.set_compute(1.0):
            whole = model(input_ids=ids).logits
        with model.set_depth("all"), model.set_select("all"):
            assert torch.equal(model(input_ids=ids).logits, whole)
    # what was configured before either is kept, and comes back when nothing is chosen
    assert configured(table(out)) == configured(table(both))
    again = tmp_path / "again"
    api.calibrate(out, text, destination=again, knob="depth", **OPTIONS)
    assert taus_of(again) == taus_of(both)
    assert rule_of(again) == rule_of(both)


def test_blocks_that_no_token_runs(both: Path, text: Path, tmp_path: Path) -> None:
    closed = Path(shutil.copytree(both, tmp_path / "closed"))
    config = json.loads((closed / "config.json").read_text())
    config["adaptive"]["sites"]["model.layers.1"]["layer"]["select"] = {"rule": "none"}
    (closed / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    said = api.calibrate(
        closed, text, destination=out, budget=0.55, knob="experts", rules=("dynamic-k",), **OPTIONS
    )
    assert said.chosen is not None
    assert rule_of(out) == rule_of(closed)
    model = load_model(out)
    with torch.no_grad(), model.collect("router_scores") as seen:
        model(input_ids=ids_of(out, text))
    assert not seen.get("model.layers.1.mlp")
    assert seen["model.layers.0.mlp"]


def test_savings_of_both_are_in_one_account(both: Path, text: Path) -> None:
    model: Any = load_model(both)
    blocks = token_blocks(read_documents(str(text), max_documents=40), both, length=16, seed=0)
    measurer = Measurer(model, blocks)
    chosen = np.arange(8)

    def compute(**select: Any) -> float:
        rules = {"*": {"rule": "all"}, **{DEPTH: select.pop("depth")}, **select}
        return measurer.measure(Setting(rule="", name="", select=rules), chosen).compute

    skip = configured(table(both))[DEPTH]
    sites = dict.fromkeys(model.adaptive_sites(), TAU)
    whole, fewer = compute(depth={"rule": "all"}), compute(depth={"rule": "all"}, **sites)
    skipping, neither = compute(depth=skip), compute(depth=skip, **sites)
    assert neither < min(fewer, skipping)
    assert max(fewer, skipping) < whole
    # an expert that a skipped token did not run is saved once
    assert whole - neither < (whole - fewer) + (whole - skipping)


def test_a_promise_is_tested_with_the_rest_held(both: Path, text: Path, tmp_path: Path) -> None:
    said = api.calibrate(
        both,
        text,
        destination=tmp_path / "out",
        max_disagreement=0.9,
        knob="experts",
        rules=("dynamic-k",),
        **OPTIONS,
    )
    assert said.chosen is not None
    assert said.rows[said.chosen].guaranteed
    assert DEPTH in said.rows[said.chosen].select


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"--knob: .* say which of them .* expected depth or experts, found none of them"),
        ({"knob": "tau"}, "--knob: .* expected depth or experts, found tau"),
        ({"knob": "depth", "rules": ("top-k",)}, "tokens skip alone"),
    ],
)
def test_which_of_them_has_to_be_said(
    both: Path, text: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        api.calibrate(both, text, destination=tmp_path / "out", budget=0.8, **options, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_knob_is_for_models_with_both(trained: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--knob: is for models with both"):
        api.calibrate(
            trained, text, destination=tmp_path / "out", budget=0.8, knob="experts", **OPTIONS
        )


def test_exits_beside_either_are_refused(both: Path, text: Path, tmp_path: Path) -> None:
    exits = tmp_path / "exits"
    api.convert(both, destination=exits, method="early-exit", exits="2", verify=False)
    with pytest.raises(OptionError, match="exits and experts to choose: only one of them"):
        api.calibrate(exits, text, destination=tmp_path / "out", budget=0.8, **OPTIONS)
