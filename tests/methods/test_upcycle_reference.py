"""Variants whose experts differ, against a decoder written independently; and what their weights
must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import adaconvert
from adaconvert.testing.reference_moe import ReferenceMoE, read_folder
from adaconvert.testing.tiny_models import make

IDS = [int(i) for i in np.random.default_rng(3).integers(3, 250, 40)]

VARIANTS: dict[str, dict[str, object]] = {
    "noise": {"noise": 0.5, "router_init": "orthogonal"},
    "drop": {"drop": 0.5, "experts": 4},
    "drop-per-matrix": {"drop": 0.5, "drop_index": "per-matrix", "experts": 4, "top_k": 3},
    "granular": {"granularity": 2, "experts": 8, "top_k": 4},
    "granular-noise": {"granularity": 4, "experts": 8, "top_k": 4, "noise": 0.3},
    "granite-fused-noise": {"target": "granitemoe", "noise": 0.5, "experts": 4},
    "granite-shared-split": {"shared_experts": "split", "noise": 0.5, "experts": 4},
    "qwen-neutral-noise": {"target": "qwen2_moe", "shared_experts": "neutral", "noise": 0.5},
    "qwen-split-noise": {
        "target": "qwen2_moe",
        "shared_experts": "split",
        "shared_width": 16,
        "noise": 0.5,
    },
    "qwen-some-layers": {"target": "qwen2_moe", "layers": "1", "noise": 0.5},
    "qwen-split-granular": {
        "target": "qwen2_moe",
        "shared_experts": "split",
        "granularity": 2,
        "experts": 8,
        "top_k": 4,
        "noise": 0.2,
    },
}


def stock_logits(folder: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("m") / "llama", head_dim=16)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_distinct_experts_compute_what_the_reference_computes(
    name: str, llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    adaconvert.convert(llama, destination=out, verify=False, seed=11, **VARIANTS[name])
    reference = ReferenceMoE(out)
    if "layers" not in VARIANTS[name]:
        experts = reference._experts("model.layers.0")[0]
        assert not np.array_equal(experts[0][1], experts[1][1])
    want = reference.logits(IDS)
    got = stock_logits(out, IDS)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def test_granular_experts_are_the_scaled_shards(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adaconvert.convert(llama, destination=out, verify=False, granularity=4, experts=8, top_k=4)
    _, dense = read_folder(llama)
    experts, router = ReferenceMoE(out)._experts("model.layers.1")
    gate, up, down = (dense[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
    m = len(gate) // 4
    for e, (g, u, d) in enumerate(experts):
        rows = slice((e % 4) * m, (e % 4 + 1) * m)
        assert np.array_equal(g, gate[rows])
        assert np.array_equal(u, 2 * up[rows])
        assert np.array_equal(d, 2 * down[:, rows])
    assert router is not None
    assert np.array_equal(router[:4], np.repeat(router[:1], 4, axis=0))
    assert not np.array_equal(router[0], router[4])


def test_drop_keeps_half_of_the_neurons_of_each_expert(llama: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    adaconvert.convert(llama, destination=out, verify=False, drop=0.5, experts=4)
    adaconvert.convert(
        llama, destination=other, verify=False, drop=0.5, experts=4, drop_index="per-matrix"
    )
    _, dense = read_folder(llama)
    gate, up, down = (dense[f"model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))

    def intact(folder: Path) -> list[np.ndarray]:
        experts, _ = ReferenceMoE(folder)._experts("model.layers.0")
        return [
            (g == gate).all(1).astype(int) + (u == up).all(1) + (d == down).all(0)
            for g, u, d in experts
        ]

    for neurons in intact(out):
        assert sorted(set(neurons.tolist())) == [0, 3]
        assert (neurons == 3).sum() == len(gate) // 2
    mixed = np.concatenate(intact(other))
    assert {1, 2} <= set(mixed.tolist())
    assert len({tuple(n) for n in intact(out)}) == 4


def test_branch_train_mix_takes_ffns_as_experts_and_averages_the_rest(
    llama: Path, tmp_path: Path
) -> None:
    other = make("llama", tmp_path / "other", head_dim=16, seed=9)
    out, based = tmp_path / "out", tmp_path / "based"
    adaconvert.convert(llama, other, destination=out, verify=False, experts=4)
    adaconvert.convert(llama, other, destination=based, verify=False, experts=4, base="other")
    models = [read_folder(folder)[1] for folder in (llama, other)]
    experts, _ = ReferenceMoE(out)._experts("model.layers.0")
    for e, (gate, _, down) in enumerate(experts):
        assert np.array_equal(gate, models[e // 2]["model.layers.0.mlp.gate_proj.weight"])
        assert np.array_equal(down, models[e // 2]["model.layers.0.mlp.down_proj.weight"])
    name = "model.layers.1.self_attn.q_proj.weight"
    mean = (models[0][name].astype(np.float32) + models[1][name].astype(np.float32)) / 2
    assert np.array_equal(read_folder(out)[1][name], mean.astype(np.float64))
    assert np.array_equal(read_folder(based)[1][name], models[1][name])
    want = ReferenceMoE(out).logits(IDS)
    assert np.abs(stock_logits(out, IDS) - want).max() <= 2e-5 * np.abs(want).max()


def test_equal_parents_give_the_parent(llama: Path, tmp_path: Path) -> None:
    twin = make("llama", tmp_path / "twin", head_dim=16)
    out = tmp_path / "out"
    adaconvert.convert(llama, twin, destination=out, verify=False, experts=4)
    dense, got = stock_logits(llama, IDS), stock_logits(out, IDS)
    assert np.abs(dense - got).max() <= 1e-5 * np.abs(dense).max()


def test_routers_from_prompts_choose_their_own_expert(llama: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "alpha beta gamma\n\n12345 67890 13579\n\n!!! ??? ;;;\n\nThe river is wide.\n"
    )
    out = tmp_path / "out"
    adaconvert.convert(
        llama,
        destination=out,
        verify=False,
        experts=4,
        router_init="hidden",
        router_prompts=str(prompts),
    )
    _, router = ReferenceMoE(out)._experts("model.layers.1")
    assert router is not None
    assert np.linalg.matrix_rank(router, tol=1e-4) == 3
    assert np.isfinite(router).all()
    reference = ReferenceMoE(out).logits(IDS)
    assert np.abs(stock_logits(out, IDS) - reference).max() <= 2e-5 * np.abs(reference).max()
