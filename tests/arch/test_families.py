"""Family files against the truth: transformers' own classes, and the files its models write."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from adaconvert.arch import families, positions, registry, values
from adaconvert.arch.base import ModelSpec
from adaconvert.arch.check import audit
from adaconvert.io.header import read_header
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.testing.tiny_models import VARIANTS, build, config_values, make

FAMILIES = registry.supported()
DECODERS = [name for name in FAMILIES if registry.FAMILIES[name].kind == "decoder"]
HEADS = [
    (name, architecture)
    for name in ("bert", "vit")
    for architecture in registry.FAMILIES[name].architectures
]
NO_DEFAULTS: dict[str, dict[str, object]] = {
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    # 96 heads do not divide the default size of 4096
    "glm4_moe": {"head_dim": 128},
}


def read_back(folder: Path) -> tuple[dict[str, object], dict[str, TensorRef]]:
    """Return config.json and every stored tensor of a checkpoint folder."""
    stored: dict[str, TensorRef] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= read_header(path, path.name)[0]
    return json.loads((folder / "config.json").read_text()), stored


def assert_exact(folder: Path) -> ModelSpec:
    """Hold the description of a config.json to the files beside it, in both directions."""
    config, stored = read_back(folder)
    spec = registry.describe(config)
    described = {tensor.name: tensor.shape for tensor in spec.tensors}
    required = {tensor.name for tensor in spec.tensors if not tensor.optional}
    assert {name: ref.shape for name, ref in stored.items()}.items() <= described.items()
    assert required <= stored.keys()
    audited = audit(spec, stored)
    assert (audited.dropped, audited.notes, audited.compare_ties) == ({}, (), ())
    assert sorted(audited.used) == sorted(stored)
    return spec


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_names_and_shapes_are_those_save_pretrained_writes(name: str, tmp_path: Path) -> None:
    spec = assert_exact(make(name, tmp_path / "model"))
    absent_head = any(tensor.role == "head" and tensor.optional for tensor in spec.tensors)
    assert absent_head == (spec.traits.tied and spec.kind != "vision")


@pytest.mark.parametrize(("name", "architecture"), HEADS)
def test_heads_of_encoders(name: str, architecture: str, tmp_path: Path) -> None:
    spec = assert_exact(make(name, tmp_path / "model", architecture=architecture))
    assert spec.architecture == architecture


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "glm4_moe", "granitemoe"])
def test_every_expert_has_its_index_and_role(name: str, tmp_path: Path) -> None:
    spec = assert_exact(make(name, tmp_path / "model", layers=3))
    parts = [t for t in spec.tensors if t.role in {"expert_gate", "expert_up", "expert_down"}]
    sparse = {tensor.layer for tensor in spec.tensors if tensor.role == "router"}
    if name == "granitemoe":
        fused = [t.shape for t in spec.tensors if t.role in {"expert_gate_up", "expert_downs"}]
        assert fused == [(4, 128, 32), (4, 32, 64)] * 3
        return
    assert {(t.layer, t.expert) for t in parts} == {(x, y) for x in sparse for y in range(4)}
    # gate, up and down of one expert lie side by side
    assert [t.role for t in parts[:3]] == ["expert_gate", "expert_up", "expert_down"]


def class_defaults(name: str) -> Any:
    return AutoConfig.for_model(name, **NO_DEFAULTS.get(name, {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_config_class(name: str) -> None:
    family = registry.FAMILIES[name]
    truth = class_defaults(name)
    found = values.read(family, NO_DEFAULTS.get(name, {}))
    for ours, key in family.keys.items():
        if not key.name or key.kind == "labels":
            continue
        if key.name == "sliding_window_pattern":
            # kept in a private attribute
            assert truth._sliding_window_pattern == found[ours]
            continue
        stated = getattr(truth, key.name, None)
        if key.name == "sliding_window" and not found["windowed"]:
            # the class replaces a window that is not in force by null or 0
            assert not stated
        elif key.dead is not None and key.fallback:
            # the class replaces ernie's -1 by the last layer, ViT's null by the hidden size
            assert stated in {found[ours], found["layers"] - 1}  # type: ignore[operator]
        elif stated is None and key.fallback:
            assert found[ours] == values.compute(family, key.fallback, found)
        elif key.kind == "flag":
            assert bool(found[ours]) == bool(stated)
        elif stated is None and key.kind == "list":
            assert found[ours] == []
        else:
            assert found[ours] == stated, key.name


@pytest.mark.parametrize("name", FAMILIES)
def test_aliases_are_those_of_the_config_class(name: str) -> None:
    truth = AutoConfig.for_model(name, **NO_DEFAULTS.get(name, {})).attribute_map
    for key in registry.FAMILIES[name].keys.values():
        if key.name in {"", "id2label"}:
            continue
        # an alias works in both directions, whichever of the two the class calls its own
        known = {other for pair in truth.items() if key.name in pair for other in pair}
        assert set(key.aliases) == known - {key.name}, key.name


@pytest.mark.parametrize("name", DECODERS)
def test_rotary_defaults_are_those_of_the_config_class(name: str) -> None:
    family = registry.FAMILIES[name]
    truth: Any = getattr(class_defaults(name), "rope_parameters", None)
    if family.rope is None:
        assert truth is None
        return
    types = (positions.FULL, positions.SLIDING) if family.rope.layered else (positions.FULL,)
    for layer_type, found in positions.read(family.rope, {}, types).items():
        expected = dict(truth[layer_type] if family.rope.layered else truth)
        assert found == expected


MASKS = [
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
    ("qwen2", {"use_sliding_window": False, "max_window_layers": 3}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 16}),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3}),
    ("qwen2_moe", {"use_sliding_window": True}),
    ("dots1", {"max_window_layers": 2}),
    ("dots1", {"max_window_layers": 2, "sliding_window": None}),
    ("gemma2", {}),
    ("gemma3_text", {"sliding_window_pattern": 3}),
    ("gemma3_text", {}),
    ("olmo3", {}),
    ("olmo3", {"layer_types": ["sliding_attention", "full_attention"] * 3}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1, 0, 1]}),
]


@pytest.mark.parametrize(("name", "stated"), MASKS)
def test_sliding_layers_are_those_of_the_config_class(name: str, stated: dict[str, object]) -> None:
    stated = {"num_hidden_layers": 6, **stated, **NO_DEFAULTS.get(name, {})}
    truth = AutoConfig.for_model(name, **stated)
    spec = registry.describe({"model_type": name, **stated})
    slides = registry.layer_mask(spec, "sliding")
    assert slides == tuple(kind == "sliding_attention" for kind in truth.layer_types)
    kind = "uniform" if all(slides) else "per_layer" if any(slides) else "none"
    assert spec.traits.sliding == kind
    assert spec.traits.sliding_window == (truth.sliding_window if any(slides) else None)
    if name == "smollm3":
        roped = registry.layer_mask(spec, "roped")
        assert roped == tuple(bool(flag) for flag in truth.no_rope_layers[:6])


@pytest.mark.parametrize(
    ("name", "stated", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 0}, None),
        ("mixtral", {}, None),
        ("phi3", {}, None),
        ("phi3", {"sliding_window": 2047}, 2047),
        ("qwen3_moe", {}, None),
        ("qwen3_moe", {"use_sliding_window": True}, 4096),
    ],
)
def test_families_with_one_window(name: str, stated: dict[str, object], window: int | None) -> None:
    traits = registry.describe({"model_type": name, **stated}).traits
    assert (traits.sliding, traits.sliding_window) == ("uniform" if window else "none", window)


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
]


@pytest.mark.parametrize(("config", "name", "shape"), PUBLISHED)
def test_published_configs(config: dict[str, object], name: str, shape: tuple[int, ...]) -> None:
    tensors = {tensor.name: tensor for tensor in registry.describe(config).tensors}
    assert tensors[name].shape == shape
    assert tensors[name].transposed == (config["model_type"] == "gpt2")


# --- older spellings of names


def renamed_copy(folder: Path, rename: Callable[[str], str]) -> dict[str, TensorRef]:
    _, stored = read_back(folder)
    return {rename(name): ref for name, ref in stored.items()}


def test_gpt2_files_without_the_prefix(tmp_path: Path) -> None:
    folder = make("gpt2", tmp_path / "model")
    stored = renamed_copy(folder, lambda name: name.removeprefix("transformer."))
    buffer = TensorRef(name="b", dtype="F32", shape=(1, 1, 8, 8), file="f", start=0, nbytes=256)
    stored |= {"h.0.attn.bias": buffer, "h.1.attn.masked_bias": buffer}
    spec = registry.describe(read_back(folder)[0], stored)
    audited = audit(spec, stored)
    assert audited.dropped == dict.fromkeys(
        ["h.0.attn.bias", "h.1.attn.masked_bias"], "causal mask, computed by the model"
    )
    assert {tensor.name for tensor in spec.tensors if not tensor.optional} == set(audited.used)


def test_bert_files_with_gamma_beta_and_another_head(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "model", architecture="BertForPreTraining")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(name: str) -> str:
        end = next((end for end in old if name.endswith(end)), None)
        return name.removesuffix(end) + old[end] if end else name

    stored = renamed_copy(folder, rename)
    config = read_back(folder)[0] | {"architectures": ["BertForMaskedLM"]}
    audited = audit(registry.describe(config, stored), stored)
    assert any(name.endswith("LayerNorm.gamma") for name in audited.used)
    assert sorted(audited.dropped) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    ]


# --- families are data


FILES = sorted(Path(families.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_family_files_are_short_and_hold_no_code(path: Path) -> None:
    if path.stem == "common":
        return
    source = path.read_text()
    assert len(source.splitlines()) <= 80
    for node in ast.parse(source).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or isinstance(node, ast.ImportFrom | ast.Assign)


@pytest.mark.parametrize("name", FAMILIES)
def test_architectures_are_transformers_classes_of_that_family(name: str) -> None:
    for architecture in registry.FAMILIES[name].architectures:
        assert getattr(transformers, architecture).config_class.model_type == name
