"""Every family with an exact host, converted end to end: default verification must hold it to
exactness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adaconvert
from adaconvert.errors import OptionError, SourceError, VerificationError
from adaconvert.testing.tiny_models import VARIANTS, make

#: variant or family -> (options, host that must come out).
EXACT: dict[str, list[tuple[dict[str, object], str]]] = {
    "llama": [
        ({}, "mixtral"),
        ({"target": "qwen2_moe"}, "qwen2_moe"),
        ({"target": "glm4_moe"}, "glm4_moe"),
        ({"target": "ernie4_5_moe"}, "ernie4_5_moe"),
        ({"target": "granitemoe"}, "granitemoe"),
        ({"shared_experts": "split"}, "granitemoeshared"),
        ({"shared_experts": "neutral"}, "granitemoeshared"),
        ({"target": "qwen2_moe", "shared_experts": "split"}, "qwen2_moe"),
        ({"granularity": 2, "experts": 8, "top_k": 2}, "mixtral"),
        ({"granularity": 4, "experts": 8, "top_k": 8}, "mixtral"),
        ({"router_init": "zeros"}, "mixtral"),
        ({"router_init": "orthogonal", "experts": 3, "top_k": 1}, "mixtral"),
    ],
    "llama-tied": [({}, "mixtral")],
    "llama-llama3-rope": [({}, "mixtral")],
    "llama-head-dim": [({}, "mixtral")],
    "llama-attention-bias": [({}, "granitemoe")],
    "mistral-sliding": [({}, "mixtral")],
    "qwen2": [
        ({}, "qwen2_moe"),
        ({"shared_experts": "split"}, "qwen2_moe"),
        ({"target": "glm4_moe"}, "glm4_moe"),
    ],
    "qwen2-tied": [({}, "qwen2_moe")],
    "qwen2-sliding": [({}, "qwen2_moe")],
    "qwen3": [({}, "qwen3_moe"), ({"layers": "1"}, "qwen3_moe"), ({"target": "dots1"}, "dots1")],
    "qwen3-tied": [({"granularity": 2, "experts": 4, "top_k": 2}, "qwen3_moe")],
    "olmo2": [({}, "flex_olmo")],
    "olmo": [({}, "mixtral")],
    "phi3": [({}, "mixtral")],
    "granite": [({}, "granitemoe"), ({"shared_experts": "split"}, "granitemoeshared")],
    "gemma": [({}, "granitemoe"), ({"target": "mixtral"}, "mixtral")],
}
CASES = [(name, *case) for name, cases in EXACT.items() for case in cases]


def tiny(name: str, folder: Path) -> Path:
    family, overrides = VARIANTS.get(name, (name, {}))
    return make(family, folder, **overrides)


@pytest.mark.parametrize(
    ("name", "options", "host"),
    CASES,
    ids=[f"{c[0]}-{c[2]}-{len(c[1])}-{i}" for i, c in enumerate(CASES)],
)
def test_converts_exactly(name: str, options: dict[str, object], host: str, tmp_path: Path) -> None:
    source = tiny(name, tmp_path / "dense")
    result = adaconvert.convert(source, destination=tmp_path / "out", **{"experts": 4, **options})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == host
    verification = result.manifest["verification"]
    assert isinstance(verification, dict)
    assert verification["ok"] is True
    assert result.report.exactness.kind in {"exact", "exact-fp32"}


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("gemma2", "soft-cap"),
        ("gemma3_text", "norms before and after"),
        ("smollm3", "NoPE"),
        ("gpt2", "gate"),
        ("gpt_neox", "gate"),
        ("llama-mlp-bias", "biases in the FFN"),
        ("bert", "encoder"),
    ],
)
def test_models_no_host_can_hold_are_refused_with_the_feature(
    name: str, feature: str, tmp_path: Path
) -> None:
    source = tiny(name, tmp_path / "dense")
    with pytest.raises(OptionError, match=feature):
        adaconvert.convert(source, destination=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_a_mixture_is_not_upcycled_again(tmp_path: Path) -> None:
    source = make("mixtral", tmp_path / "moe")
    with pytest.raises(SourceError, match="already a mixture of 4 experts"):
        adaconvert.convert(source, destination=tmp_path / "out")


def test_widths_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense", intermediate_size=40)
    with pytest.raises(OptionError, match=r"--granularity: 40 neurons .*divisor of 40, found 16"):
        adaconvert.plan(source, experts=16, top_k=16, granularity=16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"intermediate_size": 48}, "differ in intermediate_size"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "differ in rope"),
        ({"tie_word_embeddings": True}, "differ in tied"),
    ],
)
def test_sources_that_disagree_are_named(
    change: dict[str, object], match: str, tmp_path: Path
) -> None:
    one, two = make("llama", tmp_path / "one"), make("llama", tmp_path / "two", **change)
    with pytest.raises(OptionError, match=f"one and two {match}"):
        adaconvert.plan(one, two)


def test_sources_with_other_tokenizers_are_named(tmp_path: Path) -> None:
    one, two = make("llama", tmp_path / "one"), make("llama", tmp_path / "two", seed=1)
    file = two / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(OptionError, match=r"one and two differ in tokenizer.json"):
        adaconvert.plan(one, two)


def test_sources_must_share_the_experts_equally(tmp_path: Path) -> None:
    sources = [make("llama", tmp_path / str(i), seed=i) for i in range(3)]
    with pytest.raises(OptionError, match="3 sources cannot share 8 full experts"):
        adaconvert.plan(*sources)
    with pytest.raises(
        OptionError, match=r"--base: is none of the sources; expected average or one of"
    ):
        adaconvert.plan(*sources, experts=3, base="nowhere")


def test_plan_says_what_it_costs(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    report = adaconvert.plan(source, experts=8, top_k=2)
    assert report.after.flops > report.before.flops
    assert any("does not save compute" in line for line in report.lines())
    granular = adaconvert.plan(source, experts=8, top_k=2, granularity=2)
    router = 2 * 2 * 8 * 32
    assert granular.after.flops == report.before.flops + router
    assert granular.after.total_params == report.before.total_params + 2 * (
        3 * 3 * 32 * 64 + 8 * 32
    )
    assert {v.runtime for v in report.runtimes} >= {"vllm", "llama.cpp"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shared_experts": "neutral", "shared_width": 999}, "--shared-width: is wider than"),
        ({"shared_experts": "split", "shared_width": 63}, "a multiple of 4 neurons in float32"),
        ({"granularity": 32, "experts": 32, "top_k": 32}, "gives experts 2 neurons wide"),
        ({"base": "other"}, "--base: needs several sources; found other"),
    ],
)
def test_what_could_not_run_is_refused_before_anything_is_written(
    options: dict[str, object], match: str, tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "dense")
    with pytest.raises(OptionError, match=match):
        adaconvert.convert(source, destination=tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_float64_is_refused_unless_cast(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense", dtype="float64")
    with pytest.raises(OptionError, match="--dtype: transformers cannot run experts in float64"):
        adaconvert.plan(source)
    assert adaconvert.plan(source, dtype="float32").exactness.kind == "exact-fp32"


def test_a_result_without_a_bound_is_held_to_its_own_sources(tmp_path: Path) -> None:
    one, two = make("llama", tmp_path / "one"), make("llama", tmp_path / "two", seed=1)
    noisy, mix = tmp_path / "noisy", tmp_path / "mix"
    adaconvert.convert(one, destination=noisy, verify=False, experts=2, noise=0.01)
    assert adaconvert.verify(one, noisy).ok
    adaconvert.convert(one, two, destination=mix, verify=False, experts=2)
    assert adaconvert.verify(one, two, mix).ok
    for wrong in ((two, noisy), (two, one, mix), (one, mix)):
        with pytest.raises(VerificationError, match="was not made from these sources"):
            adaconvert.verify(*wrong)


def test_tensors_outside_the_index_can_be_left_out(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    moved = content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    with pytest.raises(SourceError, match="--ignore-unindexed"):
        adaconvert.plan(source)
    content["weight_map"]["model.norm.weight"] = moved
    index.write_text(json.dumps(content))


def test_prompts_that_look_alike_are_refused(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the same\nthe same\n")
    options = {"experts": 2, "router_init": "hidden", "router_prompts": str(prompts)}
    with pytest.raises(OptionError, match="two groups of prompts look the same"):
        adaconvert.convert(source, destination=tmp_path / "out", **options)
