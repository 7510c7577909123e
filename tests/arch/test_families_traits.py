"""Traits against the modules of a built model, and configs as older versions wrote them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from adaconvert.arch import positions, registry
from adaconvert.testing.tiny_models import VARIANTS, build, config_values

FAMILIES = registry.supported()
DECODERS = [name for name in FAMILIES if registry.FAMILIES[name].kind == "decoder"]


# --- traits against the modules of a built model


def attention_of(layer: Any) -> Any:
    return next(
        m for path, m in layer.named_modules() if path in {"self_attn", "attn", "attention"}
    )


@pytest.mark.parametrize("name", [*DECODERS, *(n for n in VARIANTS if not n.startswith("vit"))])
def test_traits_are_those_of_the_modules(name: str) -> None:
    family = VARIANTS.get(name, (name,))[0]
    model = build(family, config_values(name))
    spec = registry.describe({"model_type": family, **config_values(name)})
    blocks = [m for m in model.modules() if type(m).__name__.endswith(("Layer", "Block"))]
    blocks = [m for m in blocks if any(attention_of_or_none(m))]
    assert len(blocks) == spec.layers
    for index, block in enumerate(blocks):
        attention = attention_of(block)
        assert attention.scaling == pytest.approx(spec.traits.attention_scale, rel=1e-12)
        slides = registry.layer_mask(spec, "sliding") or (spec.traits.sliding == "uniform",) * 9
        if hasattr(attention, "sliding_window") and spec.traits.sliding == "per_layer":
            assert bool(attention.sliding_window) == slides[index]
        if hasattr(attention, "use_rope"):
            assert bool(attention.use_rope) == registry.layer_mask(spec, "roped")[index]
    assert bool(model.config.tie_word_embeddings) == spec.traits.tied
    for eps in norm_eps(model):
        assert eps == spec.traits.norm_eps


def attention_of_or_none(layer: Any) -> list[Any]:
    return [m for path, m in layer.named_modules() if path in {"self_attn", "attn", "attention"}]


def norm_eps(model: Any) -> list[float]:
    found = []
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            if eps is not None:
                found.append(eps)
    return found


EXPECTED: dict[str, dict[str, object]] = {
    "llama-attention-bias": {"qkv_bias": True, "o_bias": True, "mlp_bias": False},
    "llama-mlp-bias": {"qkv_bias": False, "mlp_bias": True},
    "llama-llama3-rope": {"rope_type": "llama3", "rope": "one", "tied": True},
    "qwen2": {"qkv_bias": True, "o_bias": False},
    "qwen3": {"qk_norm": "head", "qkv_bias": False},
    "gemma": {"norm": "rms_plus_one", "embed_scale": 32**0.5, "activation": "gelu_pytorch_tanh"},
    "gemma2": {"norm_placement": "sandwich", "softcap": True, "sliding": "per_layer"},
    "gemma2-no-caps": {"softcap": False, "o_bias": True},
    "gemma3_text": {"qk_norm": "head", "rope": "two", "softcap": False},
    "gemma3_text-full": {"rope": "one", "sliding": "none"},
    "phi3-longrope": {"rope_type": "longrope", "partial_rotary": 1.0},
    "phi3-partial": {"rope_type": "default", "partial_rotary": 0.5},
    "olmo": {"norm": "layernorm_no_params", "norm_eps": 1e-5, "clip_qkv": None},
    "olmo-clip": {"clip_qkv": 0.5},
    "olmo2": {"norm_placement": "post", "qk_norm": "full"},
    "olmo3": {"sliding": "uniform", "rope": "one"},
    "olmo3-full": {"sliding": "none"},
    "granite": {
        "embed_scale": 1.5,
        "logits_scale": 2.0,
        "residual_scale": 0.7,
        "attention_scale": 0.3,
    },
    "smollm3": {"rope": "nope"},
    "smollm3-all-rope": {"rope": "one"},
    "gpt2": {"norm": "layernorm", "ffn": "plain", "rope": "none", "activation": "gelu_new"},
    "gpt_neox": {"norm_placement": "parallel", "partial_rotary": 0.25, "mlp_bias": True},
    "gpt_neox-serial": {"norm_placement": "pre", "qkv_bias": False},
    "bert": {"norm_placement": "post_residual", "rope": "none", "norm_eps": 1e-12},
    "vit-no-bias": {"qkv_bias": False, "o_bias": True},
    "glm4_moe": {"partial_rotary": 0.5, "qk_norm": "none"},
    "glm4_moe-all-sparse": {"qk_norm": "head", "o_bias": False, "qkv_bias": True},
    "olmoe": {"qk_norm": "full", "clip_qkv": None, "norm_eps": 1e-5, "qkv_bias": False},
    "olmoe-bias": {"clip_qkv": 1.0, "o_bias": True, "tied": True},
    "deepseek_v2": {"qkv_bias": False, "attention_scale": 0.25, "tied": False},
    "deepseek_v2-bias": {"qkv_bias": True, "o_bias": True},
    "ernie4_5_moe-bias": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_traits(name: str) -> None:
    family = VARIANTS.get(name, (name,))[0]
    traits = registry.describe({"model_type": family, **config_values(name)}).traits
    assert {field: getattr(traits, field) for field in EXPECTED[name]} == EXPECTED[name]


# --- configs as transformers 4 wrote them


OLD: list[tuple[str, dict[str, object], dict[str, object]]] = [
    ("llama", {"rope_theta": 500000.0, "rope_scaling": None}, {"rope_theta": 500000.0}),
    (
        "llama",
        {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 1e5, "rope_type": "linear", "factor": 2.0},
    ),
    (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        {"rope_type": "longrope"},
    ),
    ("phi3", {"partial_rotary_factor": 0.75}, {"partial_rotary_factor": 0.75}),
    (
        "gpt_neox",
        {"rotary_emb_base": 5000, "rotary_pct": 0.5},
        {"rope_theta": 5000, "partial_rotary_factor": 0.5},
    ),
    ("glm4_moe", {"partial_rotary_factor": 1.0}, {"partial_rotary_factor": 1.0}),
]


@pytest.mark.parametrize(("name", "stated", "expected"), OLD)
def test_rotary_keys_of_transformers_4(
    name: str, stated: dict[str, object], expected: dict[str, object]
) -> None:
    rope = registry.FAMILIES[name].rope
    assert rope is not None
    found = positions.read(rope, stated)[positions.FULL]
    assert expected.items() <= found.items()
    truth = dict(AutoConfig.for_model(name, **rope_safe(stated)).rope_parameters)
    assert {key: truth[key] for key in expected} == expected


def rope_safe(stated: dict[str, object]) -> dict[str, object]:
    scaling = stated.get("rope_scaling")
    if isinstance(scaling, dict) and "short_factor" in scaling:
        # as many factors as half a head has dimensions
        stated = {**stated, "hidden_size": 64, "num_attention_heads": 32}
    return stated


def test_rotary_keys_of_gemma_3_in_transformers_4() -> None:
    stated: dict[str, object] = {
        "rope_theta": 2e6,
        "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    rope = registry.FAMILIES["gemma3_text"].rope
    assert rope is not None
    found = positions.read(rope, stated, (positions.FULL, positions.SLIDING))
    truth = AutoConfig.for_model("gemma3_text", **stated).rope_parameters
    assert found == {key: dict(value) for key, value in truth.items()}


def test_the_key_partial_rotary_is_ignored_where_transformers_ignores_it() -> None:
    config = {"model_type": "llama", "partial_rotary_factor": 0.5}
    assert registry.describe(config).traits.partial_rotary == 1.0
    scaled = {**config, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert registry.describe(scaled).traits.partial_rotary == 0.5


def test_gemma_reads_its_first_config_as_the_tanh_approximation() -> None:
    config = {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None}
    assert registry.describe(config).traits.activation == "gelu_pytorch_tanh"


_DEEPSEEK_LITE: dict[str, object] = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
#: what config.json of well-known checkpoints says, as far as it matters; a name and its shape.
PUBLISHED: list[tuple[dict[str, object], str, tuple[int, ...]]] = [
    (
        {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
        "model.layers.0.self_attn.q_proj.weight",
        (2048, 1024),
    ),
    (
        {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128, "num_hidden_layers": 40},
        "model.layers.39.self_attn.o_proj.weight",
        (5120, 4096),
    ),
    (
        {"model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 24}
        | {"num_key_value_heads": 8, "partial_rotary_factor": 0.75},
        "model.layers.0.self_attn.qkv_proj.weight",
        (5120, 3072),
    ),
    (
        {"model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_ctx": 1024},
        "transformer.h.47.mlp.c_fc.weight",
        (1600, 6400),
    ),
    (
        {"model_type": "glm4_moe", "hidden_size": 5120, "num_attention_heads": 96, "head_dim": 128},
        "model.layers.45.mlp.experts.127.down_proj.weight",
        (5120, 1408),
    ),
    (
        {"model_type": "olmoe", "intermediate_size": 1024},
        "model.layers.15.mlp.experts.63.down_proj.weight",
        (2048, 1024),
    ),
    (_DEEPSEEK_LITE, "model.layers.0.self_attn.q_proj.weight", (3072, 2048)),
    (_DEEPSEEK_LITE, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (576, 2048)),
    (_DEEPSEEK_LITE, "model.layers.26.self_attn.kv_b_proj.weight", (4096, 512)),
    (_DEEPSEEK_LITE, "model.layers.0.mlp.up_proj.weight", (10944, 2048)),
    (_DEEPSEEK_LITE, "model.layers.1.mlp.experts.63.up_proj.weight", (1408, 2048)),
    (_DEEPSEEK_LITE, "model.layers.26.mlp.shared_experts.down_proj.weight", (2048, 2816)),
]


@pytest.mark.parametrize(("config", "name", "shape"), PUBLISHED)
def test_published_configs(config: dict[str, object], name: str, shape: tuple[int, ...]) -> None:
    tensors = {tensor.name: tensor for tensor in registry.describe(config).tensors}
    assert tensors[name].shape == shape
    assert tensors[name].transposed == (config["model_type"] == "gpt2")
