"""Group D: values. NaN and overflow stop a run before anything has a name; odd but finite values
survive."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

import adaconvert
from adaconvert.errors import AdaconvertError, SourceError, VerificationError
from adaconvert.testing.reference_moe import read_folder
from adaconvert.testing.tiny_models import make


def patch(folder: Path, name: str, index: int, value: float) -> Path:
    """Overwrite one float32 element of a stored tensor in place; return its shard."""
    for file in folder.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        if name in header:
            start = 8 + length + header[name]["data_offsets"][0] + 4 * index
            raw[start : start + 4] = struct.pack("<f", value)
            file.write_bytes(raw)
            return file
    raise KeyError(name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make("llama", tmp_path / "dense")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"],
)
def test_d1_non_finite_values_stop_the_run(
    source: Path, tmp_path: Path, name: str, value: float
) -> None:
    shard = patch(source, name, 17, value)
    with pytest.raises(
        SourceError, match=rf"{shard.name}.*'{name}' holds 1 non-finite value.*index 17"
    ):
        adaconvert.convert(source, destination=tmp_path / "out", verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_d1_allowed_values_are_recorded(source: Path, tmp_path: Path) -> None:
    patch(source, "model.norm.weight", 0, float("inf"))
    result = adaconvert.convert(
        source, destination=tmp_path / "out", verify=False, allow_nonfinite=True
    )
    notes = result.manifest["notes"]
    assert isinstance(notes, list)
    assert any("model.norm.weight" in str(note) and "non-finite" in str(note) for note in notes)


@pytest.mark.parametrize("method", ["upcycle", "moefy"])
def test_d1_what_is_finite_is_verified(source: Path, tmp_path: Path, method: str) -> None:
    # row 300 of the head is of a token the tokenizer does not have
    patch(source, "lm_head.weight", 300 * 32, float("nan"))
    result = adaconvert.convert(
        source,
        destination=tmp_path / "out",
        method=method,
        **({"num_experts": 4} if method == "moefy" else {}),
        allow_nonfinite=True,
    )
    checked = result.manifest["verification"]
    assert isinstance(checked, dict)
    assert checked["ok"]
    assert checked["logits_left_out"] == checked["tokens"]
    assert any("logits that are no numbers in the source" in x for x in result.verification_lines)


@pytest.mark.parametrize("method", ["upcycle", "moefy"])
def test_d1_nothing_to_compare_says_how_to_go_on(source: Path, tmp_path: Path, method: str) -> None:
    patch(source, "model.layers.1.mlp.down_proj.weight", 17, float("nan"))
    with pytest.raises(VerificationError, match=r"not one logit of the source.*with --no-verify"):
        adaconvert.convert(
            source,
            destination=tmp_path / "out",
            method=method,
            **({"num_experts": 4} if method == "moefy" else {}),
            allow_nonfinite=True,
        )
    assert not (tmp_path / "out").exists()


def test_d2_zero_tensors_and_dead_neurons_work(source: Path, tmp_path: Path) -> None:
    for i in range(32):
        patch(source, "model.layers.0.post_attention_layernorm.weight", i, 0.0)
        patch(source, "model.layers.1.mlp.up_proj.weight", i, 0.0)
    result = adaconvert.convert(source, destination=tmp_path / "out", experts=4)
    assert result.manifest["verification"]


def test_d4_a_cast_that_overflows_is_refused(source: Path, tmp_path: Path) -> None:
    patch(source, "model.layers.0.self_attn.q_proj.weight", 5, 1e6)
    with pytest.raises(
        SourceError, match=r"q_proj.weight: cast to float16 makes 1 values infinite"
    ):
        adaconvert.convert(source, destination=tmp_path / "out", dtype="float16", verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_d6_odd_bits_are_copied_exactly(source: Path, tmp_path: Path) -> None:
    odd = [1e-45, -0.0, 3.4028234e38, -1e-40]
    name = "model.layers.0.mlp.gate_proj.weight"
    for index, value in enumerate(odd):
        patch(source, name, index, value)
    adaconvert.convert(source, destination=tmp_path / "out", verify=False)
    want = read_folder(source)[1][name]
    got = read_folder(tmp_path / "out")[1]["model.layers.0.block_sparse_moe.experts.7.w1.weight"]
    assert np.array_equal(
        want.astype(np.float32).view(np.uint32), got.astype(np.float32).view(np.uint32)
    )


def test_c9_a_head_that_differs_from_its_tie_is_refused(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdaconvertError, match="tie_word_embeddings is true, yet"):
        adaconvert.convert(source, destination=tmp_path / "out", verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_g18_the_same_inputs_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    options = {"noise": 0.1, "granularity": 2, "max_shard_size": "60KB"}
    trees = []
    for name in ("a", "b"):
        adaconvert.convert(source, destination=tmp_path / name, **options)
        trees.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert trees[0] == trees[1]
    assert len([n for n in trees[0] if n.endswith(".safetensors")]) > 3
