"""A checkpoint without some blocks computes, bit for bit, the whole model with these skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from adaconvert import api
from adaconvert.arch.registry import FAMILIES, supported
from adaconvert.errors import SourceError, VerificationError

from .conftest import BLOCKS, blocks_of, inputs_of, logits_of, opened, skipping

Deep = Callable[..., Path]
GONE = (1, 4)
KEPT = [number for number in range(BLOCKS) if number not in GONE]

#: models whose blocks differ from each other, by a rule over their numbers or by a list.
_WINDOW = {"use_sliding_window": True, "sliding_window": 8}
UNLIKE: dict[str, tuple[str, dict[str, object]]] = {
    "gemma3-pattern": ("gemma3_text", {"sliding_window_pattern": 3}),
    "qwen2-window": ("qwen2", {**_WINDOW, "max_window_layers": 3}),
    "qwen3-window": ("qwen3", {**_WINDOW, "max_window_layers": 1}),
    "smollm3-window": ("smollm3", {**_WINDOW, "no_rope_layer_interval": 3}),
    "qwen2_moe-window": ("qwen2_moe", {**_WINDOW, "max_window_layers": 4}),
    "qwen2_moe-some-dense": ("qwen2_moe", {"mlp_only_layers": [0, 2, 4]}),
    "qwen3_moe-step": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "dots1-dense": ("dots1", {"first_k_dense_replace": 3}),
    "deepseek-dense": ("deepseek_v2", {"first_k_dense_replace": 2}),
    "glm4-dense": ("glm4_moe", {"first_k_dense_replace": 5}),
    "ernie-start": ("ernie4_5_moe", {"moe_layer_start_index": 2, "moe_layer_end_index": 4}),
}
EVERY = {name: (name, {}) for name in supported()} | UNLIKE


def _drop(source: Path, target: Path, gone: tuple[int, ...] = GONE, **settings: Any) -> Any:
    named = ",".join(map(str, gone))
    return api.convert(source, destination=target, method="depth", drop=named, **settings)


def _cut_by_hand(model: Any) -> Any:
    """Take the blocks out of the model's own list and number the others anew."""
    blocks = blocks_of(model)
    for number in sorted(GONE, reverse=True):
        del blocks[number]
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    config = model.config
    for key in ("layer_types", "no_rope_layers"):
        if getattr(config, key, None) is not None:
            setattr(config, key, [getattr(config, key)[number] for number in KEPT])
    config.num_hidden_layers = len(KEPT)
    return model


@pytest.mark.parametrize("name", EVERY)
def test_the_whole_model_with_blocks_skipped(name: str, deep: Deep, tmp_path: Path) -> None:
    family, values = EVERY[name]
    source = deep(family, **values)
    _drop(source, tmp_path / "out")
    found = logits_of(opened(tmp_path / "out"))
    assert torch.equal(found, logits_of(skipping(opened(source), GONE)))
    assert torch.equal(found, logits_of(_cut_by_hand(opened(source))))
    assert not torch.equal(found, logits_of(opened(source)))


@pytest.mark.parametrize("name", [n for n in EVERY if FAMILIES[EVERY[n][0]].kind == "decoder"])
def test_a_cache_changes_nothing(name: str, deep: Deep, tmp_path: Path) -> None:
    family, values = EVERY[name]
    _drop(deep(family, **values), tmp_path / "out", verify=False)
    model = opened(tmp_path / "out")
    ids = inputs_of(model)["input_ids"]
    cache, steps = None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            made = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            steps.append(made.logits)
    whole = logits_of(model)
    assert len(cache.layers) == len(KEPT)
    assert (torch.cat(steps, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_rules_over_block_numbers_of_older_files(deep: Deep, tmp_path: Path) -> None:
    for name, values in (("gemma3_text", {"sliding_window_pattern": 2}), ("gemma2", {})):
        source = deep(name, **values, vocab_size=320)
        config = json.loads((source / "config.json").read_text())
        types = config.pop("layer_types")
        config |= values
        (source / "config.json").write_text(json.dumps(config))
        target = tmp_path / name
        _drop(source, target)
        written = json.loads((target / "config.json").read_text())
        assert written["layer_types"] == [types[number] for number in KEPT]
        assert "sliding_window_pattern" not in written
        assert torch.equal(logits_of(opened(target)), logits_of(skipping(opened(source), GONE)))


def test_names_bytes_and_record(deep: Deep, tmp_path: Path) -> None:
    source = deep("llama")
    _drop(source, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "adaconvert.json").read_text())
    assert record["options"]["blocks"] == list(GONE)
    assert record["exactness"]["kind"] == "approximate"
    gone = {entry["tensor"] for entry in record["dropped"]}
    assert len(gone) == 18
    assert all(name.startswith(("model.layers.1.", "model.layers.4.")) for name in gone)
    before, after = _tensors(source), _tensors(tmp_path / "out")
    for name, tensor in after.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(KEPT[int(parts[2])])
        assert torch.equal(tensor, before[".".join(parts)])
    assert len(after) == len(before) - len(gone)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_verify_sees_one_changed_byte(deep: Deep, tmp_path: Path) -> None:
    source, target = deep("llama"), tmp_path / "out"
    _drop(source, target)
    assert api.verify(source, target).ok
    shard = sorted(target.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(VerificationError):
        api.verify(source, target)


def test_the_plan_counts_what_is_left(deep: Deep) -> None:
    source = deep("llama")
    report = api.plan(source, method="depth", drop="1,4")
    assert report.after.flops < report.before.flops
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert report.before.total_params - report.after.total_params == 2 * block
    assert any("drops blocks 1, 4 of 0 to 5" in note for note in report.notes)


def test_twice_is_once(deep: Deep, tmp_path: Path) -> None:
    source = deep("qwen2", **_WINDOW, max_window_layers=3)
    _drop(source, tmp_path / "one", (1,))
    _drop(tmp_path / "one", tmp_path / "two", (3,))
    _drop(source, tmp_path / "both", (1, 4))
    assert torch.equal(logits_of(opened(tmp_path / "two")), logits_of(opened(tmp_path / "both")))


def test_refused_where_no_config_can_say_it(deep: Deep, tmp_path: Path) -> None:
    # sparse, dense, sparse: no interval gives it
    source = deep("ernie4_5_moe", moe_layer_start_index=0, moe_layer_interval=2)
    with pytest.raises(SourceError, match=r"moe_layer_interval.*which blocks are moe"):
        _drop(source, tmp_path / "out", (2,))


def test_refused_where_a_block_counts_its_number(deep: Deep, tmp_path: Path) -> None:
    source = deep("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(SourceError, match="scale_attn_by_inverse_layer_idx"):
        _drop(source, tmp_path / "out")


def test_refused_where_parts_name_blocks(deep: Deep, tmp_path: Path) -> None:
    split = tmp_path / "split"
    api.convert(deep("llama"), destination=split, method="moefy", num_experts=4, verify=False)
    with pytest.raises(SourceError, match="is adaptive"):
        _drop(split, tmp_path / "out")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found
