"""Null experts for dense models: a mixture is made of them first, in the same plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adaconvert
from adaconvert.methods.registry import method_of
from adaconvert.methods.sources import open_source
from adaconvert.modeling.loading import load_model
from adaconvert.planning.digest import run_digest
from adaconvert.testing.tiny_models import make

IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(5))
Convert = Callable[..., Path]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Return what makes a dense model, or several, and a mixture with null experts of it."""

    def made(name: str, sources: int = 1, **options: Any) -> Path:
        folders = [tmp_path / f"dense{number}" for number in range(sources)]
        for number, folder in enumerate(folders):
            if not folder.exists():
                make(name, folder, seed=number, max_shard_size="1GB")
        out = tmp_path / "out"
        adaconvert.convert(*folders, destination=out, method="adamoe", **options)
        return out

    return made


def record_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adaconvert.json").read_text()))


def real_experts(folder: Path) -> torch.Tensor:
    """Return how many real experts tokens run, of all blocks."""
    model: Any = load_model(folder)
    with torch.no_grad(), model.collect("experts_run") as run:
        model(input_ids=IDS)
    return torch.cat([part for found in run.values() for part in found])


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 4},
        {"experts": 4, "top_k": 3},
        {"experts": 4, "null_experts": 8, "top_k": 12, "base_top_k": 3},
        {"experts": 4, "base_top_k": 4},
        {"null_init": "bias", "null_experts": 3, "target_compute": 0.6},
        {"shared_experts": "split", "shared_width": 16, "layers": "1"},
        {"granularity": 2, "experts": 4, "base_top_k": 2},
        {"via": "moefy", "num_experts": 4},
        {"via": "moefy", "num_experts": 4, "split": "contiguous", "target_compute": 0.5},
        {"experts": 4, "materialize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
def test_step_zero_is_the_dense_model(name: str, options: dict[str, Any], convert: Convert) -> None:
    record = record_of(convert(name, **options))
    assert record["exactness"]["kind"] in {"exact", "exact-fp32"}
    assert record["verification"]["ok"]
    assert record["verification"]["relative_difference_below"] <= 1e-5


def test_one_copy_is_as_good_as_several(convert: Convert, tmp_path: Path) -> None:
    """An upcycled model keeps one real expert per token, whatever the slots are."""
    out = convert("llama", experts=4, null_experts=8, top_k=2)
    record = record_of(out)
    assert record["options"]["min_real"] == 1
    assert record["exactness"]["kind"] == "exact"
    counts = real_experts(out)
    assert int(counts.min()) == 1
    dense: Any = load_model(tmp_path / "dense0")
    nulled: Any = load_model(out)
    with torch.no_grad():
        wanted, found = dense(input_ids=IDS).logits, nulled(input_ids=IDS).logits
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_weights_of_all_selected_become_a_stock_form_later(
    convert: Convert, tmp_path: Path
) -> None:
    out = convert("llama", experts=4, null_weights="selected")
    record = record_of(out)
    assert (record["options"]["min_real"], record["exactness"]["kind"]) == (0, "exact")
    assert set(real_experts(out).tolist()) == {2}
    stock = tmp_path / "stock"
    adaconvert.convert(out, destination=stock, method="adamoe", materialize=True)
    assert record_of(stock)["verification"]["relative_difference_below"] <= 1e-5


def test_router_rows_and_their_copies_are_drawn_once(convert: Convert) -> None:
    out = convert("llama", experts=4, null_experts=8)
    held = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    site = "model.layers.0.block_sparse_moe"
    router = held[f"{site}.gate.weight"]
    assert torch.equal(held[f"{site}.null_experts.weight"], torch.cat([router, router]))


def test_several_models_become_one(convert: Convert, tmp_path: Path) -> None:
    out = convert("llama", sources=2, experts=4, base_top_k=2, target_compute=0.7)
    record = record_of(out)
    assert record["exactness"]["kind"] == "needs-training"
    assert len(record["sources"]) == 2
    assert "configured" in record["verification"]
    described = [open_source(str(tmp_path / f"dense{number}")) for number in range(2)]
    plan = method_of("adamoe").replan(record["options"], described)
    assert run_digest(plan, 5 * 10**9) == record["plan_digest"]


def test_redrawn_neurons_need_training(convert: Convert) -> None:
    record = record_of(convert("llama", experts=4, drop=0.5))
    assert record["exactness"] == {
        "kind": "needs-training",
        "why": "0.5 of every expert's neurons are re-drawn (Drop-Upcycling)",
    }
    assert record["options"]["drop"] == 0.5


def test_the_manifest_gives_the_plan_again(convert: Convert, tmp_path: Path) -> None:
    record = record_of(convert("llama", experts=4, router_init="orthogonal", dtype="bfloat16"))
    plan = method_of("adamoe").replan(record["options"], [open_source(str(tmp_path / "dense0"))])
    assert run_digest(plan, 5 * 10**9) == record["plan_digest"]


@pytest.mark.parametrize(
    "options",
    [{"experts": 4, "noise": 0.1}, {"via": "moefy", "num_experts": 4, "seed": 3}],
    ids=str,
)
def test_verified_later(options: dict[str, Any], convert: Convert, tmp_path: Path) -> None:
    out = convert("llama", **options)
    report = adaconvert.verify(tmp_path / "dense0", out)
    assert report.ok
    # with the plan, which accounts for every tensor
    assert not [note for note in report.notes if "account" in note]


def test_a_split_is_fitted_on_text(convert: Convert, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a model reads words and says which one comes next. " * 60)
    out = convert("llama", via="moefy", num_experts=4, split="coactivation", data=str(text))
    record = record_of(out)
    assert len(record["options"]["data"]) == 64
    assert record["verification"]["relative_difference_below"] <= 1e-5
