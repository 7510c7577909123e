"""The table of runtimes says what was measured, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from adaconvert.arch import registry
from adaconvert.arch.base import HostRequest
from adaconvert.arch.host import HOSTS
from adaconvert.arch.runtimes import RUNTIMES, verdicts
from adaconvert.testing.tiny_models import VARIANTS, config_values

V4, V5, VLLM, LLAMA_CPP = RUNTIMES


def judge(
    family: str, host: str, dtype: str = "float32", **changes: Any
) -> dict[str, tuple[str, str]]:
    overrides = changes.pop("overrides", {})
    family, variant = VARIANTS.get(family, (family, {}))
    values = {**config_values(family, layers=4), **variant, **overrides}
    spec = registry.describe({"model_type": family, **values})
    request: dict[str, Any] = {
        "num_experts": 4,
        "top_k": 2,
        "expert_width": spec.intermediate,
        **changes,
    }
    config = HOSTS[host].layout(spec, HostRequest(**request), dtype).config
    return {found.runtime: (found.verdict, found.why) for found in verdicts(config)}


def told(*args: Any, **changes: Any) -> list[str]:
    found = judge(*args, **changes)
    assert tuple(found) == RUNTIMES
    return [found[runtime][0] for runtime in RUNTIMES]


def test_mixtral_is_right_everywhere() -> None:
    assert told("llama-tied", "mixtral") == ["right"] * 4
    assert told("llama-llama3-rope", "mixtral") == ["right"] * 4


def test_qwen3_moe_is_right_everywhere() -> None:
    assert told("qwen3", "qwen3_moe", overrides={"tie_word_embeddings": True}) == ["right"] * 4


def test_llama_cpp_never_renormalises_qwen2_moe() -> None:
    found = judge("qwen2", "qwen2_moe")
    assert [found[runtime][0] for runtime in RUNTIMES] == ["right", "right", "right", "wrong"]
    assert "never divides the weights of the chosen experts" in found[LLAMA_CPP][1]
    assert judge("qwen2", "qwen2_moe", top_k=4)[LLAMA_CPP][0] == "untested"


def test_llama_cpp_refuses_a_tied_qwen2_moe() -> None:
    verdict, why = judge("qwen2-tied", "qwen2_moe")[LLAMA_CPP]
    assert verdict == "refused"
    assert "stored apart from the embedding" in why


@pytest.mark.parametrize("host", ["granitemoe", "qwen2_moe"])
def test_a_head_size_of_its_own_is_refused_by_some(host: str) -> None:
    found = judge("llama-head-dim", host)
    for runtime in (V4, VLLM, LLAMA_CPP):
        assert found[runtime][0] == "refused"
        assert "head_dim" in found[runtime][1]
    assert found[V5][0] == "right"


def test_windows() -> None:
    assert told("mistral-sliding", "mixtral") == ["right", "right", "right", "wrong"]
    head = {"head_dim": 8}
    assert told("qwen2-sliding", "qwen2_moe", overrides=head) == [
        "wrong",
        "right",
        "wrong",
        "wrong",
    ]
    assert "flash attention" in judge("qwen2-sliding", "qwen2_moe")[V5][1]


def test_activations_other_than_silu() -> None:
    gelu = {"hidden_act": "gelu_pytorch_tanh"}
    assert told("llama", "mixtral", overrides=gelu) == ["right", "right", "wrong", "wrong"]
    assert judge("llama", "qwen2_moe", overrides=gelu)[VLLM][0] == "refused"
    shared: dict[str, Any] = {"shared_kind": "neutral", "shared_width": 64}
    assert judge("gemma", "granitemoeshared", **shared)[VLLM][0] == "refused"
    assert judge("gemma", "granitemoe")[VLLM][0] == "wrong"


def test_biases_that_are_dropped_without_a_word() -> None:
    assert judge("llama-attention-bias", "granitemoe")[VLLM][0] == "wrong"
    assert judge("qwen3-attention-bias", "qwen3_moe")[VLLM][0] == "wrong"
    assert judge("qwen3-attention-bias", "qwen3_moe")[LLAMA_CPP][0] == "refused"


def test_dense_blocks() -> None:
    some: dict[str, Any] = {"moe_layers": frozenset({1})}
    assert told("qwen3", "qwen3_moe", **some) == ["right", "right", "right", "refused"]
    assert judge("llama", "ernie4_5_moe", **some)[LLAMA_CPP][0] == "refused"
    tail: dict[str, Any] = {"moe_layers": frozenset({2, 3})}
    assert judge("llama", "ernie4_5_moe", **tail)[LLAMA_CPP][0] == "untested"


def test_what_was_never_run_is_untested() -> None:
    assert told("granite", "granitemoe") == ["right"] * 4
    assert told("granite", "granitemoeshared")[2:] == ["untested", "untested"]
    assert told("olmo2", "flex_olmo") == ["right", "right", "right", "refused"]
    assert told("llama", "glm4_moe") == ["right", "right", "right", "refused"]
    assert told("qwen3", "dots1") == ["right", "right", "right", "refused"]


def test_longrope_is_lost_in_llama_cpp() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    verdict, why = judge("phi3", "mixtral", overrides={"rope_scaling": scaling})[LLAMA_CPP]
    assert verdict == "wrong"
    assert "longrope" in why


@pytest.mark.parametrize(
    ("dtype", "width", "verdict"),
    [("float32", 60, "right"), ("bfloat16", 60, "refused"), ("bfloat16", 64, "right")],
)
def test_rows_that_are_no_multiple_of_16_bytes(dtype: str, width: int, verdict: str) -> None:
    found = judge("llama", "mixtral", dtype, expert_width=width)
    assert found[V5][0] == verdict
    assert found[V4][0] == "right"
    if verdict == "refused":
        assert "experts_implementation='eager'" in found[V5][1]


def test_too_many_experts_for_llama_cpp() -> None:
    assert judge("llama", "mixtral", num_experts=1025)[LLAMA_CPP][0] == "refused"


@pytest.mark.parametrize("host", HOSTS)
def test_every_verdict_has_a_reason(host: str) -> None:
    families = ["llama", "qwen3", "olmo2"]
    for family in families:
        values = config_values(family, layers=4)
        spec = registry.describe({"model_type": family, **values})
        request = HostRequest(num_experts=4, top_k=2, expert_width=spec.intermediate)
        if HOSTS[host].reasons(spec, request):
            continue
        for found in verdicts(HOSTS[host].layout(spec, request, "F32").config):
            assert found.verdict in {"right", "refused", "wrong", "untested"}
            assert found.why
