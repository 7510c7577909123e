"""Which host a model goes to, and why others are refused."""

from __future__ import annotations

from typing import Any

import pytest

from adaconvert.arch.host import HOSTS, choose
from adaconvert.errors import OptionError
from adaconvert.testing.hosts_asked import ask, describe

SHARED: dict[str, Any] = {"shared_kind": "neutral", "shared_width": 64}
PARTIAL: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
}


@pytest.mark.parametrize(
    ("family", "overrides", "request_changes", "host"),
    [
        ("llama", {}, {}, "mixtral"),
        ("llama-tied", {}, {}, "mixtral"),
        ("llama-llama3-rope", {}, {}, "mixtral"),
        ("llama-attention-bias", {}, {}, "granitemoe"),
        ("llama", {}, SHARED, "granitemoeshared"),
        ("llama", {}, {"moe_layers": frozenset({1, 2})}, "qwen2_moe"),
        ("mistral-sliding", {}, {}, "mixtral"),
        ("mistral-sliding", {}, {"moe_layers": frozenset({0, 2})}, "qwen2_moe"),
        ("qwen2", {}, {}, "qwen2_moe"),
        ("qwen2-sliding", {}, {}, "qwen2_moe"),
        ("qwen2", {}, SHARED, "qwen2_moe"),
        ("qwen3", {}, {}, "qwen3_moe"),
        ("qwen3", {}, {"moe_layers": frozenset({0, 2})}, "qwen3_moe"),
        ("qwen3-sliding", {}, {}, "dots1"),
        ("qwen3", {}, SHARED, "glm4_moe"),
        ("olmo", {}, {}, "mixtral"),
        ("olmo2", {}, {}, "flex_olmo"),
        ("olmo3", {"layer_types": ["full_attention"] * 4}, {}, "flex_olmo"),
        ("phi3", {}, {}, "mixtral"),
        ("phi3", PARTIAL, {}, "glm4_moe"),
        ("granite", {}, {}, "granitemoe"),
        ("granite", {}, SHARED, "granitemoeshared"),
        ("gemma", {}, {}, "granitemoe"),
        ("gemma", {"tie_word_embeddings": False}, {}, "mixtral"),
        ("gemma", {}, {"moe_layers": frozenset({0})}, "qwen2_moe"),
    ],
)
def test_auto_takes_the_host(
    family: str, overrides: dict[str, Any], request_changes: dict[str, Any], host: str
) -> None:
    spec = describe(family, **overrides)
    assert choose(spec, ask(spec, **request_changes)).model_type == host


def test_a_target_that_fits_is_taken() -> None:
    spec = describe("llama")
    assert choose(spec, ask(spec, **SHARED), "qwen2_moe") is HOSTS["qwen2_moe"]


@pytest.mark.parametrize(
    ("family", "overrides", "feature"),
    [
        ("gemma2", {}, "norms before and after each branch"),
        ("gemma2", {}, "soft-capped attention or logits"),
        ("gemma3_text", {}, "two rotary bases, local and global"),
        ("smollm3", {}, r"layers without rotary positions \(NoPE\)"),
        ("olmo3", {}, "sliding windows in some layers only"),
        ("gpt2", {}, "an FFN without a gate"),
        ("gpt2", {}, "no rotary positions"),
        ("gpt2", {}, "LayerNorm with weights"),
        ("gpt_neox", {}, "an FFN without a gate"),
        ("bert", {}, r"an encoder \(no stock MoE architecture is one\)"),
        ("vit", {}, r"a vision model \(no stock MoE architecture is one\)"),
        ("llama-mlp-bias", {}, "biases in the FFN"),
        ("olmo", {"clip_qkv": 8.0}, "queries, keys and values clipped at 8"),
        ("mixtral", {}, "it is a mixture of experts already"),
    ],
)
def test_what_no_host_holds_is_named(family: str, overrides: dict[str, Any], feature: str) -> None:
    spec = describe(family, **overrides)
    refusal = f"no MoE architecture of transformers holds this {spec.model_type} model exactly.*"
    with pytest.raises(OptionError, match=f"{refusal}{feature}") as caught:
        choose(spec, ask(spec))
    assert "Models of these families have an exact host: gemma, granite" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("family", "request_changes", "target", "message"),
    [
        (
            "qwen2",
            {},
            "mixtral",
            r"--target: mixtral cannot hold this qwen2 model exactly: attention biases on q, k and "
            r"v \(it has none\)\. Use --target qwen2_moe or granitemoe or granitemoeshared or ",
        ),
        (
            "llama-attention-bias",
            {},
            "qwen2_moe",
            r"attention biases on q, k and v and o \(it has them on q, k and v only\)",
        ),
        ("qwen3", {}, "mixtral", r"a norm on each query and key head \(it has no norms"),
        ("llama", {}, "qwen3_moe", r"no norms on queries and keys \(it has a norm on each"),
        (
            "granite",
            {},
            "mixtral",
            "residual multiplier, logits scaling, attention multiplier other",
        ),
        (
            "olmo2",
            {},
            "mixtral",
            r"norms on the branch outputs \(it has norms before each branch\)",
        ),
        ("mistral-sliding", {}, "granitemoe", r"a sliding window in every layer \(it has full"),
        ("qwen2-sliding", {}, "mixtral", r"some layers only \(it has one window for all layers\)"),
        ("llama", SHARED, "mixtral", r"a shared expert \(it has none\)\. Use --target granitemoe"),
        (
            "llama",
            {"moe_layers": frozenset({1})},
            "mixtral",
            r"3 of 4 blocks left dense \(in it every block is MoE\)",
        ),
        (
            "llama",
            {"moe_layers": frozenset({1})},
            "glm4_moe",
            r"3 of 4 blocks left dense \(in it dense blocks can only come first\)",
        ),
        (
            "llama",
            {"moe_layers": frozenset({0, 2})},
            "ernie4_5_moe",
            r"2 of 4 blocks left dense \(in it its MoE blocks are one run\)",
        ),
        (
            "llama",
            {"moe_layers": frozenset({4})},
            "qwen2_moe",
            r"block 4 \(the source has blocks 0-3\)",
        ),
        (
            "llama",
            {"shared_kind": "split", "shared_width": 16, "expert_width": 48},
            "glm4_moe",
            r"a shared expert of 16 neurons \(in it a multiple of the 48 of a routed one\)",
        ),
        ("llama", {"num_experts": 1}, "glm4_moe", r"1 experts \(its router needs at least 2\)"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(
    family: str, request_changes: dict[str, Any], target: str, message: str
) -> None:
    spec = describe(family)
    with pytest.raises(OptionError, match=message):
        choose(spec, ask(spec, **request_changes), target)


def test_partial_rotary_is_refused_where_heads_are_rotated_whole() -> None:
    spec = describe("phi3", **PARTIAL)
    with pytest.raises(OptionError, match=r"rotary positions on 0\.5 of each head .*glm4_moe"):
        choose(spec, ask(spec), "mixtral")


def test_a_request_that_asks_too_much_is_told_what_works() -> None:
    olmo2 = describe("olmo2")
    with pytest.raises(OptionError, match="Without a shared expert, flex_olmo holds it"):
        choose(olmo2, ask(olmo2, **SHARED))
    with pytest.raises(OptionError, match="With every block converted, flex_olmo holds it"):
        choose(olmo2, ask(olmo2, moe_layers=frozenset({1})))
    with pytest.raises(OptionError, match="Without a shared expert and with every block converted"):
        choose(olmo2, ask(olmo2, moe_layers=frozenset({1}), **SHARED))


def test_an_unknown_target_is_refused_with_the_nearest_name() -> None:
    spec = describe("llama")
    with pytest.raises(OptionError, match=r"there is no target 'mixtrla'.*Did you mean mixtral\?"):
        choose(spec, ask(spec), "mixtrla")
    with pytest.raises(OptionError, match=r"there is no target '\\x1b"):
        choose(spec, ask(spec), "\x1b[31m")
