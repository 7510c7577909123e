"""Every dense family: all experts on are the dense model, and unmoefy gives its bytes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adaconvert
from adaconvert.api import unmoefy
from adaconvert.testing.tiny_models import make

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo"),
    *("olmo2", "olmo3", "granite", "smollm3", "gpt2", "gpt_neox", "bert", "vit"),
)
#: variants that differ in what a split touches: biases, ties, widths.
VARIANTS = ("llama-tied", "llama-mlp-bias", "gpt2-inner", "gpt_neox-tied", "granite-bias")


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_all_experts_on_is_dense_and_back_again(
    family: str, dtype: str, tmp_path: Path, raw: Callable[[Path], Any]
) -> None:
    source = make(family, tmp_path / "dense", dtype=dtype)
    made = adaconvert.convert(
        source,
        destination=tmp_path / "moe",
        method="moefy",
        split="random",
        router="similarity",
        num_experts=4,
        max_shard_size="40KB",
    )
    verification = made.manifest["verification"]
    assert isinstance(verification, dict)
    assert verification["promise"] == "exact"
    assert verification["ok"] is True
    # 1e-5 of the largest logit, the bound of the class; random splits reach 1e-6
    assert verification["relative_difference_below"] <= 1e-5
    back = unmoefy(tmp_path / "moe", tmp_path / "back")
    assert back.found == ("every tensor is, bit for bit, that of dense",)
    assert raw(tmp_path / "back") == raw(source)
    assert raw(tmp_path / "moe") != raw(source)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        if (source / name).exists():
            assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_every_dtype_comes_back(dtype: str, tmp_path: Path, raw: Callable[[Path], Any]) -> None:
    source = make("llama", tmp_path / "dense", dtype=dtype)
    adaconvert.convert(
        source,
        destination=tmp_path / "moe",
        method="moefy",
        split="random",
        expert_width=2,
        router="gate",
        verify=dtype != "float64",
    )
    unmoefy(tmp_path / "moe", tmp_path / "back", verify=False)
    assert raw(tmp_path / "back") == raw(source)


def test_a_stored_copy_of_a_tied_head_comes_back(
    tmp_path: Path, raw: Callable[[Path], Any]
) -> None:
    from safetensors.torch import load_file, save_file

    source = make("llama-tied", tmp_path / "dense", max_shard_size="1GB")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    adaconvert.convert(
        source, destination=tmp_path / "moe", method="moefy", split="random", router="gate"
    )
    unmoefy(tmp_path / "moe", tmp_path / "back")
    assert "lm_head.weight" in raw(tmp_path / "back")
    assert raw(tmp_path / "back") == raw(source)


def test_a_checkpoint_transformers_saved_again_comes_back(
    tmp_path: Path, raw: Callable[[Path], Any]
) -> None:
    """Without adaconvert's own files, the dense model follows from config.json and tensors."""
    from adaconvert.modeling.loading import load_model

    source = make("qwen2", tmp_path / "dense", dtype="bfloat16")
    adaconvert.convert(
        source,
        destination=tmp_path / "moe",
        method="moefy",
        split="random",
        router="param-center",
        verify=False,
    )
    load_model(tmp_path / "moe").save_pretrained(tmp_path / "again")
    back = unmoefy(tmp_path / "again", tmp_path / "back", verify=False)
    assert back.found == ()
    assert raw(tmp_path / "back") == raw(source)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    wanted = json.loads((source / "config.json").read_text())
    assert config["architectures"] == wanted["architectures"]
    assert not {"adaptive", "auto_map"} & set(config)
    assert {key: config.get(key) for key in wanted} == wanted


def test_changed_weights_are_said_to_be(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make("llama", tmp_path / "dense", max_shard_size="1GB")
    adaconvert.convert(
        source,
        destination=tmp_path / "moe",
        method="moefy",
        split="random",
        router="gate",
        verify=False,
        num_experts=4,
    )
    file = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    back = unmoefy(tmp_path / "moe", tmp_path / "back", verify=False)
    assert back.found == ("the weights are not those of dense: they were changed since",)


def _renamed(folder: Path, old: str, new: str) -> None:
    """Rename tensors of a one-file checkpoint."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [("gpt2", "transformer.", ""), ("bert", "LayerNorm.weight", "LayerNorm.gamma")],
)
def test_old_spellings_stay_as_they_are(
    family: str, old: str, new: str, tmp_path: Path, raw: Callable[[Path], Any]
) -> None:
    source = make(family, tmp_path / "dense", max_shard_size="1GB")
    _renamed(source, old, new)
    made = adaconvert.convert(
        source, destination=tmp_path / "moe", method="moefy", split="random", router="similarity"
    )
    assert made.report.after.ffn_flops > made.report.before.ffn_flops > 0
    unmoefy(tmp_path / "moe", tmp_path / "back")
    assert raw(tmp_path / "back") == raw(source)
