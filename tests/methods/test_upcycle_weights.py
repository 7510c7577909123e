"""What the weights of variants must be whose experts differ; what they compute is held against a
decoder written independently in test_upcycle_reference.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adaconvert
from adaconvert.testing.reference_moe import Glu, ReferenceMoE, read_folder
from adaconvert.testing.tiny_models import make

Options = dict[str, Any]
Sources = Callable[..., Path]


def convert(dense: Sources, name: str, out: Path, **options: Any) -> ReferenceMoE:
    """Return the reference model of a tiny source converted as asked."""
    sources = [dense(name, seed) for seed in options.pop("seeds", (0,))]
    adaconvert.convert(
        *sources, destination=out, verify=False, **{"experts": 4, "seed": 11, **options}
    )
    return ReferenceMoE(out)


def dense_glu(folder: Path, layer: int) -> Glu:
    """Return gate, up and down of a dense block, fused or not; down centred for OLMo 1.

    OLMo's LayerNorm has no parameters: it is an RMSNorm where nothing written to the residual
    stream has a mean.
    """
    config, tensors = read_folder(folder)
    name = f"model.layers.{layer}.mlp"
    down = tensors[f"{name}.down_proj.weight"]
    if config["model_type"] == "olmo":
        down = down - down.mean(axis=0)
    if f"{name}.gate_up_proj.weight" in tensors:
        gate, up = np.split(tensors[f"{name}.gate_up_proj.weight"], 2)
        return gate, up, down
    return tensors[f"{name}.gate_proj.weight"], tensors[f"{name}.up_proj.weight"], down


@pytest.fixture(scope="module")
def llama(dense: Sources) -> Path:
    return dense("llama-head-dim")


def test_granular_experts_are_the_scaled_shards(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adaconvert.convert(llama, destination=out, verify=False, granularity=4, experts=8, top_k=4)
    gate, up, down = dense_glu(llama, 1)
    block = ReferenceMoE(out).block(1)
    m = len(gate) // 4
    for e, (g, u, d) in enumerate(block.experts):
        rows = slice((e % 4) * m, (e % 4 + 1) * m)
        assert np.array_equal(g, gate[rows])
        assert np.array_equal(u, 2 * up[rows])
        assert np.array_equal(d, 2 * down[:, rows])
    assert block.router is not None
    assert np.array_equal(block.router[:4], np.repeat(block.router[:1], 4, axis=0))
    assert not np.array_equal(block.router[0], block.router[4])


@pytest.mark.parametrize("name", ["llama-head-dim", "phi3", "granite"])
def test_noise_is_measured_in_standard_deviations_of_each_matrix(
    name: str, dense: Sources, tmp_path: Path
) -> None:
    reference = convert(dense, name, tmp_path / "out", noise=0.5)
    for layer in range(2):
        whole = dense_glu(dense(name), layer)
        drawn = [
            (matrix - base) / base.std()
            for expert in reference.block(layer).experts
            for matrix, base in zip(expert, whole, strict=True)
        ]
        flat = np.array([draw.reshape(-1) for draw in drawn])
        assert flat.std(axis=1) == pytest.approx(0.5, abs=0.05)
        # no two draws are alike
        assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.15


@pytest.mark.parametrize("name", ["llama-head-dim", "phi3", "granite", "olmo"])
def test_drop_keeps_half_of_the_neurons_of_each_expert(
    name: str, dense: Sources, tmp_path: Path
) -> None:
    gate, up, down = dense_glu(dense(name), 0)

    def alike(got: Any, want: Any, axis: int) -> Any:
        # a computed matrix is rounded to float32
        wrong, whole = (np.linalg.norm(part, axis=axis) for part in (got - want, want))
        return (wrong <= np.finfo(np.float32).eps * whole).astype(int)

    def intact(model: ReferenceMoE) -> list[Any]:
        return [
            sum(map(alike, expert, (gate, up, down), (1, 1, 0)))
            for expert in model.block(0).experts
        ]

    shared = intact(convert(dense, name, tmp_path / "out", drop=0.5))
    for neurons in shared:
        assert sorted(set(neurons.tolist())) == [0, 3]
        assert (neurons == 3).sum() == len(gate) // 2
    assert len({tuple(n) for n in shared}) == 4
    mixed = intact(convert(dense, name, tmp_path / "other", drop=0.5, drop_index="per-matrix"))
    assert {1, 2} <= set(np.concatenate(mixed).tolist())


@pytest.mark.parametrize("name", ["llama-head-dim", "phi3", "granite", "qwen3", "olmo2"])
def test_branch_train_mix_takes_ffns_as_experts_and_averages_the_rest(
    name: str, dense: Sources, tmp_path: Path
) -> None:
    mixed = convert(dense, name, tmp_path / "mixed", seeds=(0, 1))
    based = convert(dense, name, tmp_path / "based", seeds=(0, 1), base=f"{name}-1")
    models = [read_folder(dense(name, seed))[1] for seed in (0, 1)]
    parents = [dense_glu(dense(name, seed), 1) for seed in (0, 1)]
    for reference in (mixed, based):
        for e, expert in enumerate(reference.block(1).experts):
            for got, want in zip(expert, parents[e // 2], strict=True):
                assert np.array_equal(got, want)
    for rest in ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"):
        one, two = (model[rest].astype(np.float32) for model in models)
        assert np.array_equal(mixed.tensors[rest], ((one + two) / 2).astype(np.float64))
        assert np.array_equal(based.tensors[rest], two)


def test_experts_of_more_files_than_stay_open(tmp_path: Path) -> None:
    sources = [make("granite", tmp_path / str(i), seed=i, max_shard_size="9KB") for i in range(4)]
    assert all(len(list(s.glob("*.safetensors"))) > 8 for s in sources)
    out = tmp_path / "out"
    adaconvert.convert(
        *sources, destination=out, verify=False, experts=4, target="granitemoe", base="0"
    )
    fused = "model.layers.0.block_sparse_moe.input_linear.weight"
    got = read_folder(out)[1][fused]
    for index, source in enumerate(sources):
        dense = read_folder(source)[1]
        parts = [dense[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert np.array_equal(got[index], np.concatenate(parts))
