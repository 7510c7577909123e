"""Block by block equals whole, bit for bit, and never holds more than a block."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from adaconvert.errors import OptionError, SourceError, VerificationError
from adaconvert.io.source import Source
from adaconvert.layerwise.runner import LayerwiseModel
from adaconvert.testing.tiny_models import make

IDS = torch.arange(2 * 24).reshape(2, 24).mul(7).remainder(320)

#: family or variant -> config values that differ; three blocks each.
CASES: dict[str, dict[str, object]] = {
    "llama": {},
    "llama-tied": {},
    "llama-llama3-rope": {},
    "llama-attention-bias": {},
    "mistral-sliding": {},
    "qwen2-sliding": {},
    "qwen3-sliding": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granite": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {"sliding_window": 8},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"decoder_sparse_step": 2},
    "olmoe": {"clip_qkv": 1.0},
    "deepseek_v2": {"first_k_dense_replace": 2},
    "deepseek_v2-lite": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "flex_olmo": {},
    "glm4_moe": {},
    "dots1": {},
    "ernie4_5_moe": {"moe_layer_interval": 2},
}
SMOKE = {"llama-tied", "qwen2-sliding", "mixtral", "granitemoe"}


def whole(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def by_block(model: LayerwiseModel) -> torch.Tensor:
    hidden = model.embed(IDS)
    for block in model.blocks():
        hidden = block(hidden)
    return model.head(hidden, chunk=7)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.smoke if n in SMOKE else ()) for n in CASES]
)
def test_equals_the_whole_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = make(name, tmp_path / "m", layers=3, **CASES[name])
    assert torch.equal(by_block(LayerwiseModel(folder)), whole(folder))


def test_sixteen_bit_weights_are_computed_in_float32(tmp_path: Path) -> None:
    folder = make("mixtral", tmp_path / "m", dtype="bfloat16")
    assert torch.equal(by_block(LayerwiseModel(folder)), whole(folder))


def test_reads_each_weight_once_and_only_the_rows_of_the_ids(tmp_path: Path) -> None:
    folder = make("mixtral", tmp_path / "m")
    model = LayerwiseModel(folder)
    refs = model.source.tensors
    hidden = model.embed(IDS[:1, :5])
    rows = 5 * refs["model.embed_tokens.weight"].nbytes // 320
    assert model.count.total == rows + refs["model.norm.weight"].nbytes
    for index in range(model.num_blocks):
        before = model.count.total
        hidden = model.block(index)(hidden)
        of_block = sum(r.nbytes for n, r in refs.items() if n.startswith(f"model.layers.{index}."))
        assert model.count.total - before == of_block
    before = model.count.total
    model.head(hidden)
    ends = refs["lm_head.weight"].nbytes + refs["model.norm.weight"].nbytes
    assert model.count.total - before == ends
    blocks = [n for n in refs if ".layers." in n]
    assert {model.count.tensors[n] for n in blocks} == {1}


def test_a_block_is_freed_before_the_next_is_loaded(tmp_path: Path) -> None:
    model = LayerwiseModel(make("mixtral", tmp_path / "m", layers=3))
    living: list[weakref.ref[torch.nn.Parameter]] = []
    hidden = model.embed(IDS)
    gc.disable()
    try:
        for block in model.blocks():
            assert not [ref for ref in living if ref() is not None]
            living = [weakref.ref(p) for p in block.module.parameters()]
            hidden = block(hidden)
    finally:
        gc.enable()


def test_a_run_resumes_from_saved_states(tmp_path: Path) -> None:
    model = LayerwiseModel(make("llama", tmp_path / "m", layers=3))
    states = [model.embed(IDS)]
    for block in model.blocks():
        states.append(block(states[-1]))
    resumed = [
        block(state) for block, state in zip(model.blocks(start=1), states[1:], strict=False)
    ]
    assert all(torch.equal(a, b) for a, b in zip(resumed, states[2:], strict=True))


def test_hooks_on_the_module_see_what_the_block_computes(tmp_path: Path) -> None:
    model = LayerwiseModel(make("llama", tmp_path / "m"))
    block = model.block(0)
    seen: list[torch.Tensor] = []
    hook = block.module.mlp.register_forward_hook(lambda m, args, out: seen.append(out))
    block(model.embed(IDS))
    hook.remove()
    assert seen[0].shape == (2, 24, 32)


def test_random_state_and_verbosity_are_left_alone(tmp_path: Path) -> None:
    from transformers.utils import logging

    model = LayerwiseModel(make("llama", tmp_path / "m"))
    torch.manual_seed(3)
    before, verbosity = torch.get_rng_state(), logging.get_verbosity()
    by_block(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.get_verbosity() == verbosity


def test_a_missing_weight_is_named_with_its_real_block(tmp_path: Path) -> None:
    source = Source.open(make("llama", tmp_path / "m"))
    del source.tensors["model.layers.1.mlp.up_proj.weight"]
    model = LayerwiseModel(source)
    model.block(0)
    with pytest.raises(VerificationError, match=r"in block 1, .*model\.layers\.1\.mlp\.up_proj"):
        model.block(1)


def test_a_block_that_depends_on_its_place_is_refused(tmp_path: Path) -> None:
    # GPT-2 can divide attention by the block's index, which a block alone does not know
    folder = make("gpt2", tmp_path / "m", scale_attn_by_inverse_layer_idx=True)
    model = LayerwiseModel(folder)
    model.block(0)
    with pytest.raises(OptionError, match=r"block 1 cannot be run alone: attn has other settings"):
        model.block(1)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="vit is no language model"):
        LayerwiseModel(make("vit", tmp_path / "m"))


def test_a_source_that_shrinks_is_an_error_and_no_crash(tmp_path: Path) -> None:
    model = LayerwiseModel(make("llama", tmp_path / "m", max_shard_size="1GB"))
    shard = tmp_path / "m" / "model.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    with pytest.raises(SourceError, match="source changed while reading"):
        model.block(1)


def test_code_named_in_the_config_never_reaches_transformers(tmp_path: Path) -> None:
    import json

    folder = make("llama", tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "auto_map": {"AutoModelForCausalLM": "modeling_x.Model"},
    }
    path.write_text(json.dumps(config))
    model = LayerwiseModel(folder)
    model.block(0)(model.embed(IDS))
    assert not hasattr(model.config, "auto_map")
