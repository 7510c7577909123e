"""A tiny dense model and what its layout says, loaded by stock transformers, compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaconvert.arch.host import HOSTS, choose
from adaconvert.testing import tiny_models
from adaconvert.testing.hosts_by_hand import (
    Source,
    ask,
    compute,
    difference,
    load,
    materialise,
    open_source,
)

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[str, Source] = {}

    def get(family: str, layers: int = 2, **overrides: Any) -> Source:
        key = f"{family}-{layers}-{sorted(overrides.items())}"
        if key not in known:
            folder = tmp_path_factory.mktemp("source")
            tiny_models.make(family, folder, layers=layers, max_shard_size="1GB", **overrides)
            known[key] = open_source(folder)
        return known[key]

    return get


#: (source, config overrides, host): the host table, and variants that went wrong in other tools.
PAIRS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "mixtral"),
    ("llama-tied", {}, "mixtral"),
    ("llama-llama3-rope", {}, "mixtral"),
    ("llama-head-dim", {}, "mixtral"),
    ("llama-mha", {}, "mixtral"),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "mixtral"),
    ("llama", {"rms_norm_eps": 1e-2}, "mixtral"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "mixtral"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
        "mixtral",
    ),
    (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
            "max_position_embeddings": 32,
        },
        "mixtral",
    ),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "mixtral",
    ),
    ("llama", {}, "qwen2_moe"),
    ("llama", {}, "glm4_moe"),
    ("llama", {}, "ernie4_5_moe"),
    ("llama-head-dim", {}, "ernie4_5_moe"),
    ("llama-llama3-rope", {}, "ernie4_5_moe"),
    ("llama", {}, "granitemoe"),
    ("llama-tied", {}, "granitemoe"),
    ("llama-head-dim", {}, "granitemoe"),
    ("llama", {}, "granitemoeshared"),
    ("llama-attention-bias", {}, "granitemoe"),
    ("mistral-sliding", {}, "mixtral"),
    ("mistral-full", {}, "mixtral"),
    ("mistral-sliding", {}, "qwen2_moe"),
    ("qwen2", {}, "qwen2_moe"),
    ("qwen2-tied", {}, "qwen2_moe"),
    ("qwen2-sliding", {}, "qwen2_moe"),
    ("qwen2-sliding", {"layer_types": ["sliding_attention", "full_attention"]}, "qwen2_moe"),
    ("qwen2-sliding-all", {}, "qwen2_moe"),
    ("qwen2", {}, "glm4_moe"),
    ("qwen2", {}, "granitemoe"),
    ("qwen3", {}, "qwen3_moe"),
    ("qwen3-tied", {}, "qwen3_moe"),
    ("qwen3-attention-bias", {}, "qwen3_moe"),
    ("qwen3-attention-bias", {}, "dots1"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        "qwen3_moe",
    ),
    ("qwen3", {}, "dots1"),
    ("qwen3-sliding", {}, "dots1"),
    ("qwen3", {}, "glm4_moe"),
    ("olmo2", {}, "flex_olmo"),
    ("olmo2", {"tie_word_embeddings": True, "attention_bias": True}, "flex_olmo"),
    ("olmo3", {"layer_types": ["full_attention", "full_attention"]}, "flex_olmo"),
    ("olmo", {}, "mixtral"),
    ("olmo", {"tie_word_embeddings": True}, "mixtral"),
    ("olmo", {"attention_bias": True}, "granitemoe"),
    ("phi3", {}, "mixtral"),
    ("phi3", {"sliding_window": 8}, "mixtral"),
    ("phi3", {"sliding_window": 8}, "qwen2_moe"),
    ("granite", {}, "granitemoe"),
    ("granite", {"attention_bias": True, "tie_word_embeddings": True}, "granitemoe"),
    ("granite", {}, "granitemoeshared"),
    ("gemma", {}, "mixtral"),
    ("gemma", {}, "granitemoe"),
    ("gemma", {"hidden_size": 48, "head_dim": 16}, "granitemoe"),
    ("gemma", {"tie_word_embeddings": False}, "mixtral"),
]


def label(case: tuple[str, dict[str, Any], str]) -> str:
    source, overrides, host = case
    return "-".join([source, *overrides, "to", host])


@pytest.mark.parametrize("case", PAIRS, ids=label)
def test_a_dense_model_and_its_host_compute_the_same(
    case: tuple[str, dict[str, Any], str], sources: Any, tmp_path: Path
) -> None:
    family, overrides, host = case
    source = sources(family, **overrides)
    worst, same_tokens = difference(source, host, ask(source.spec), tmp_path)
    assert worst <= TOLERANCE
    assert same_tokens


PARTIAL = {"partial_rotary_factor": 0.5}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}


@pytest.mark.parametrize(
    ("rope", "host"),
    [
        pytest.param(
            {"rope_type": "default", "rope_theta": 1e4, **PARTIAL}, "glm4_moe", id="partial"
        ),
        pytest.param(LONG, "mixtral", id="longrope"),
        pytest.param(
            {**LONG, **PARTIAL, "short_factor": [1.0, 1.1], "long_factor": [1.5, 2.0]},
            "glm4_moe",
            id="partial-longrope",
        ),
    ],
)
def test_phi3_rope_variants(rope: dict[str, Any], host: str, sources: Any, tmp_path: Path) -> None:
    """Past its original length Phi-3 drops its cache, so there continuations differ by design."""
    source = sources("phi3", rope_parameters=rope)
    worst, same_tokens = difference(source, host, ask(source.spec), tmp_path)
    assert worst <= TOLERANCE
    assert same_tokens or rope["rope_type"] == "longrope"


@pytest.mark.parametrize(
    ("family", "host", "layers"),
    [
        ("qwen3", "qwen3_moe", {1}),
        ("qwen3", "qwen3_moe", {0, 2}),
        ("qwen2", "qwen2_moe", {0}),
        ("llama", "qwen2_moe", {1, 2}),
        ("phi3", "qwen2_moe", {1}),
        ("olmo", "qwen2_moe", {1}),
        ("llama", "glm4_moe", {1, 2}),
        ("qwen3", "dots1", {2}),
        ("llama", "ernie4_5_moe", {1}),
        ("llama", "ernie4_5_moe", {0, 1}),
    ],
)
def test_some_blocks_stay_dense(
    family: str, host: str, layers: set[int], sources: Any, tmp_path: Path
) -> None:
    source = sources(family, layers=3)
    request = ask(source.spec, moe_layers=frozenset(layers))
    worst, same_tokens = difference(source, host, request, tmp_path)
    assert worst <= TOLERANCE
    assert same_tokens


@pytest.mark.parametrize("kind", ["neutral", "split"])
@pytest.mark.parametrize(
    ("family", "host"),
    [
        ("llama", "qwen2_moe"),
        ("qwen2", "qwen2_moe"),
        ("llama", "granitemoeshared"),
        ("gemma", "granitemoeshared"),
        ("granite", "granitemoeshared"),
        ("phi3", "glm4_moe"),
        ("qwen3", "dots1"),
        ("llama", "ernie4_5_moe"),
        ("olmo", "granitemoeshared"),
    ],
)
def test_shared_experts(family: str, host: str, kind: str, sources: Any, tmp_path: Path) -> None:
    source = sources(family)
    width = source.spec.intermediate // (2 if kind == "split" else 1)
    request = ask(source.spec, shared_kind=kind, shared_width=width, expert_width=width)
    worst, same_tokens = difference(source, host, request, tmp_path)
    assert worst <= TOLERANCE
    assert same_tokens


def test_a_shared_expert_need_not_be_as_wide_as_a_routed_one(sources: Any, tmp_path: Path) -> None:
    source = sources("llama")
    request = ask(source.spec, shared_kind="split", shared_width=16, expert_width=48)
    for host in ("granitemoeshared", "qwen2_moe"):
        folder = tmp_path / host
        folder.mkdir()
        worst, _ = difference(source, host, request, folder)
        assert worst <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "host"),
    [("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("phi3", "glm4_moe"), ("qwen3", "dots1")],
)
@pytest.mark.parametrize("dtype", ["BF16", "float16"])
def test_copies_are_exact_in_16_bits(
    family: str, host: str, dtype: str, sources: Any, tmp_path: Path
) -> None:
    """A layout that computes nothing keeps 16-bit weights as they are."""
    source = sources(family)
    layout = HOSTS[host].layout(source.spec, ask(source.spec), dtype)
    assert not layout.rounds
    assert layout.config["dtype"] == {"BF16": "bfloat16"}.get(dtype, dtype)
    assert layout.config["torch_dtype"] == layout.config["dtype"]


# Negative controls: had these been let through, the result would compute something else.


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("gemma2", {}), ("gemma3_text", {}), ("smollm3", {"layers": 4}), ("llama-mlp-bias", {})],
)
def test_no_host_takes_these(family: str, overrides: dict[str, Any], sources: Any) -> None:
    spec = sources(family, **overrides).spec
    assert all(host.reasons(spec, ask(spec)) for host in HOSTS.values())


def test_a_lost_window_shows(sources: Any, tmp_path: Path) -> None:
    """The probe is long enough: without the window, the same tensors compute something else."""
    source = sources("mistral-sliding")
    request = ask(source.spec)
    layout = HOSTS["mixtral"].layout(source.spec, request, "float32")
    layout.config["sliding_window"] = None
    materialise(source, layout, request, tmp_path)
    logits, _ = compute(load(tmp_path))
    assert (logits - source.logits).abs().max() > 0.01 * source.logits.abs().max()


def test_routing_that_is_not_renormalised_shows(sources: Any, tmp_path: Path) -> None:
    source = sources("qwen3")
    request = ask(source.spec)
    layout = HOSTS["qwen3_moe"].layout(source.spec, request, "float32")
    layout.config["norm_topk_prob"] = False
    materialise(source, layout, request, tmp_path)
    logits, _ = compute(load(tmp_path))
    assert (logits - source.logits).abs().max() > 0.01 * source.logits.abs().max()


def test_auto_is_exact_for_every_supported_family(sources: Any, tmp_path: Path) -> None:
    expected = {
        "llama": "mixtral",
        "llama-attention-bias": "granitemoe",
        "mistral-sliding": "mixtral",
        "qwen2": "qwen2_moe",
        "qwen3": "qwen3_moe",
        "phi3": "mixtral",
        "olmo": "mixtral",
        "olmo2": "flex_olmo",
        "granite": "granitemoe",
        "gemma": "granitemoe",
    }
    for family, host in expected.items():
        spec = sources(family).spec
        assert choose(spec, ask(spec)).model_type == host
