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
from adaconvert.testing.tiny_models import VARIANTS, make

FAMILIES = registry.supported()
DECODERS = [name for name in FAMILIES if registry.FAMILIES[name].kind == "decoder"]
HEADS = [
    (name, architecture)
    for name in ("bert", "vit")
    for architecture in registry.FAMILIES[name].architectures
]
NO_DEFAULTS: dict[str, dict[str, object]] = {
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 6},
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


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "glm4_moe", "granitemoe", "olmoe", "deepseek_v2"]
)
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
    family = registry.FAMILIES[name]
    for architecture in family.architectures:
        config = getattr(transformers, architecture).config_class
        assert (config.model_type, config.__name__) == (name, f"{family.stem}Config")
    assert getattr(transformers, f"{family.stem}Model").config_class is config
