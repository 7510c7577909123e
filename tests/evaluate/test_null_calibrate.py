"""`calibrate` on models with null experts: settings, table, default, and the knobs afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert import api
from adaconvert.data.text import read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.errors import OptionError
from adaconvert.evaluate.calibration_output import stale
from adaconvert.evaluate.calibration_result import CalibrationResult
from adaconvert.evaluate.null_grid import STORED
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.calibrating import OPTIONS, assert_whole, documents, table, teach
from adaconvert.testing.null_by_hand import make_nulled

SITES = [f"model.layers.{layer}.mlp" for layer in range(2)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(documents(120, seed=0)))
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a mixture that knows the language, so that fewer experts cost it something."""
    folder = tiny_models.make("mixtral", tmp_path_factory.mktemp("trained") / "stock")
    teach(folder, 1200)
    return folder


@pytest.fixture(scope="module")
def nulled(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nulled(stock, tmp_path_factory.mktemp("nulled") / "nulled")


Report = tuple[Path, CalibrationResult]


@pytest.fixture(scope="module")
def report(nulled: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Return a copy calibrated to a budget, and what was said of it."""
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    return folder, api.calibrate(nulled, text, destination=folder, budget=0.85, **OPTIONS)


@pytest.fixture
def copy(report: Report, tmp_path: Path) -> Path:
    return Path(shutil.copytree(report[0], tmp_path / "copy"))


def blocks_of(folder: Path, text: Path) -> torch.Tensor:
    """Return token ids of one length."""
    found = token_blocks(read_documents(text), folder, length=16)
    return torch.from_numpy(found.ids[found.weights.all(axis=1)])


def test_rows_are_null_biases_and_the_reference_is_the_source(report: Report) -> None:
    folder, said = report
    assert_whole(folder)
    adaptive = table(folder)
    rows = adaptive["calibration"]["rows"]
    assert rows[-1]["name"] == "no null experts"
    assert rows[-1]["select"] == {"*": {"rule": "all"}}
    assert rows[-1]["compute"] == 1.0
    assert len(rows) > 3
    rules = {one["rule"] for row in rows[:-1] for one in row["select"].values()}
    assert "null" in rules
    assert rules <= {"null", "top-k"}
    for row in rows[:-1]:
        assert row["compute"] < 1
        for one in row["select"].values():
            assert set(one) == {"rule", {"null": "bias", "top-k": "k"}[one["rule"]]}
    assert [row.compute for row in said.rows] == sorted(row.compute for row in said.rows)


def test_the_chosen_setting_is_every_sites_default(report: Report, nulled: Path) -> None:
    folder, said = report
    assert said.chosen is not None
    row = said.rows[said.chosen]
    assert row.compute <= 0.85
    for path, slots in table(folder)["sites"].items():
        assert slots["ffn"]["select"] == (row.select.get(path) or row.select["*"])
    assert table(nulled)["sites"][SITES[0]]["ffn"]["select"] == {"rule": "null"}
    configured = table(folder)["calibration"]["configured"]
    assert configured == {path: {"rule": "null"} for path in SITES}


def test_the_default_computes_what_the_row_says(report: Report, text: Path) -> None:
    folder, said = report
    assert said.chosen is not None
    select = said.rows[said.chosen].select
    ids = blocks_of(folder, text)
    model = load_model(folder)
    with torch.no_grad():
        default = model(input_ids=ids).logits
        with model.set_compute(0.85):
            assert torch.equal(model(input_ids=ids).logits, default)
        own = [(p, dict(select.get(p) or select["*"])) for p in SITES]
        model.set_select("all")
        for path, one in own:
            model.set_select(one.pop("rule"), sites=[path], **one)
        assert torch.equal(model(input_ids=ids).logits, default)
        model.set_compute(1.0)
        assert not torch.equal(model(input_ids=ids).logits, default)


def test_every_row_is_taken_by_set_compute_and_generate(report: Report, text: Path) -> None:
    folder, said = report
    model = load_model(folder)
    ids = blocks_of(folder, text)
    for row in said.rows:
        with model.set_compute(row.compute), model.account() as account, torch.no_grad():
            model(input_ids=ids)
        # other text than it was measured on
        assert abs(account.compute() - row.compute) < 0.05
        out = model.generate(ids[:1, :4], compute=row.compute, max_new_tokens=3, do_sample=False)
        with model.set_compute(row.compute):
            same = model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)
        assert torch.equal(out, same)
    assert model._adaptive_knobs == {}
    with pytest.raises(ValueError, match="below what this model was calibrated for"):
        model.set_compute(said.rows[0].compute - 0.01)


def test_a_trained_mixture_loses_with_the_experts_it_leaves_out(report: Report) -> None:
    rises = [row.loss_increase for row in report[1].rows]
    assert rises[0] > rises[-1] == 0.0


def test_static_numbers_of_real_experts_are_swept_alone_when_asked(
    nulled: Path, text: Path, tmp_path: Path
) -> None:
    said = api.calibrate(nulled, text, destination=tmp_path / "a", rules=("top-k",), **OPTIONS)
    assert [row.select["*"] for row in said.rows] == [{"rule": "top-k", "k": 1}, {"rule": "all"}]
    assert [row.name for row in said.rows] == ["top-k, k 1", "no null experts"]
    assert table(tmp_path / "a")["sites"][SITES[0]]["ffn"]["select"] == {"rule": "null"}


def test_biases_can_be_given(nulled: Path, text: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"rules": ("null",), "values": (0.5, 2.0, 30.0)}
    said = api.calibrate(nulled, text, destination=tmp_path / "a", **given, **OPTIONS)
    biases = {row.select["*"].get("bias") for row in said.rows}
    assert biases <= {0.5, 2.0, 30.0, None}
    assert 30.0 in biases


def test_shares_of_each_layer_are_found(nulled: Path, text: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "max_tokens": 900}
    said = api.calibrate(
        nulled, text, destination=tmp_path / "a", per_layer=True, rules=("null",), **options
    )
    tried = [row for row in said.rows if "per layer" in row.name]
    assert tried
    for row in tried:
        assert set(row.select) == set(SITES)
    assert said.rows[-1].compute == 1.0


def test_what_the_model_holds_is_measured_as_well(stock: Path, text: Path, tmp_path: Path) -> None:
    def spend(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("null_experts.bias"):
                tensors[name].fill_(30.0)

    held = make_nulled(stock, tmp_path / "held", edit=spend)
    # no share that is swept is as cheap as tokens without a real expert
    said = api.calibrate(held, text, destination=tmp_path / "a", budget=0.9, **OPTIONS)
    cheapest = said.rows[0]
    names = [row.name for row in said.rows]
    assert cheapest.name == STORED.name
    assert cheapest.select == {"*": {"rule": "null"}}
    assert cheapest.compute < 0.6
    assert len(names) == len(set(names))


def test_a_promise_is_kept_for_null_experts_too(nulled: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**OPTIONS, "unit": "block"}
    said = api.calibrate(
        nulled, text, destination=tmp_path / "a", max_disagreement=0.6, confidence=0.8, **options
    )
    assert said.risk is not None
    assert any(row.guaranteed for row in said.rows)
    assert said.chosen is not None
    chosen = said.rows[said.chosen]
    assert chosen.guaranteed
    # of something that costs less than the source, too
    assert chosen.compute < 1


def test_the_table_is_stale_when_biases_or_slots_change(copy: Path) -> None:
    assert stale(copy) == []
    file = copy / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("null_experts.bias"))
    tensors[name] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    assert stale(copy) == ["the weights have changed since"]


def test_the_table_is_stale_when_the_block_is_described_otherwise(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    spec = config["adaptive"]["sites"][SITES[0]]["ffn"]
    spec["select"] = {"rule": "all"}
    (copy / "config.json").write_text(json.dumps(config))
    assert stale(copy) == []
    spec["null"]["min_real"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    assert stale(copy) == ["config.json has changed since"]


def test_calibrating_again_without_a_choice_goes_back(copy: Path, text: Path) -> None:
    said = api.calibrate(copy, text, **OPTIONS)
    assert said.chosen is None
    assert "the default is the conversion's again" in " ".join(said.notes)
    assert table(copy)["sites"][SITES[0]]["ffn"]["select"] == {"rule": "null"}
    assert_whole(copy)


@pytest.mark.parametrize("rule", ["threshold", "dynamic-k", "top-p"])
def test_rules_of_split_networks_are_refused(
    nulled: Path, text: Path, tmp_path: Path, rule: str
) -> None:
    target = tmp_path / "out"
    with pytest.raises(OptionError, match=f"--rule {rule}: is not for a model with null experts"):
        api.calibrate(nulled, text, destination=target, rules=(rule,), **OPTIONS)
    assert not target.exists()
