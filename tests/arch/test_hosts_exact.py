"""A tiny dense model and what its layout says, loaded by stock transformers, compute the same.

The interpreter below is the smallest thing that can follow a layout; it shares nothing with
`planning`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaconvert.arch import registry
from adaconvert.arch.base import Carry, HostLayout, HostRequest, HostTensor, ModelSpec
from adaconvert.arch.host import HOSTS, choose
from adaconvert.testing import tiny_models

EXPERTS, TOP_K, LENGTH, NEW_TOKENS = 4, 2, 40, 12
TOLERANCE = 1e-5

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """A tiny dense checkpoint: what it is, what it holds, what it computes."""

    spec: ModelSpec
    tensors: Tensors
    logits: torch.Tensor
    tokens: torch.Tensor


def probe(vocab: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, vocab, (2, length), generator=torch.Generator().manual_seed(7))


def compute(model: Any, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of two probe sequences and the greedy continuation of the first."""
    ids = probe(model.config.vocab_size, length)
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(
            ids[:1],
            attention_mask=torch.ones_like(ids[:1]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return logits, tokens


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


def open_source(folder: Path) -> Source:
    config = json.loads((folder / "config.json").read_text())
    logits, tokens = compute(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    tensors = load_file(folder / "model.safetensors")
    return Source(spec=registry.describe(config), tensors=tensors, logits=logits, tokens=tokens)


def interleave(weight: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    halves = weight.reshape(heads, 2, head_dim // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


FUNCTIONS: dict[str, Any] = {
    "plus_one": lambda w: w + 1,
    "scale": lambda w, factor: w * factor,
    "center_rows": lambda w: w - w.mean(dim=1, keepdim=True),
    "center_out": lambda w: w - w.mean(dim=0, keepdim=True),
    "interleave_rope": interleave,
}


def follow(carry: Carry, shape: tuple[int, ...], tensors: Tensors) -> torch.Tensor:
    params = dict(carry.params)
    if carry.tensor is None:
        assert carry.fn == "constant"
        return torch.full(shape, float(params["value"]))
    weight = tensors[carry.tensor]
    if carry.rows is not None:
        start, count = carry.rows
        weight = weight[start : start + count]
    return FUNCTIONS[carry.fn](weight, **params) if carry.fn else weight.clone()


@dataclass(frozen=True)
class Neurons:
    """Gate and up rows [n, H] and down columns [H, n] of some neurons of a dense FFN."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def cut(self, start: int, count: int) -> Neurons:
        part = slice(start, start + count)
        return Neurons(self.gate[part], self.up[part], self.down[:, part])


def neurons(source: Source, layout: HostLayout, layer: int) -> Neurons:
    found = {}
    for name, rows in source.spec.ffn_rows(layer).items():
        found[name] = source.tensors[rows.tensor][rows.start : rows.start + rows.count]
    if layout.down_fn:
        found["down"] = FUNCTIONS[layout.down_fn](found["down"])
    return Neurons(**found)


def fill(
    source: Source, layout: HostLayout, request: HostRequest, tensor: HostTensor
) -> torch.Tensor:
    """Return an expert, shared or router tensor of an exact upcycling with identical experts."""
    assert tensor.layer is not None
    if tensor.role == "router":
        seed = torch.Generator().manual_seed(100 + tensor.layer)
        return 0.5 * torch.randn(tensor.shape, generator=seed)
    if tensor.role == "shared_router":
        return torch.zeros(tensor.shape)
    dense = neurons(source, layout, tensor.layer)
    split = request.shared_kind == "split"
    shared = dense.cut(0, request.shared_width)
    routed = dense.cut(request.shared_width if split else 0, request.expert_width)
    # a shared expert behind a sigmoid of zero counts half
    factor = (2.0 if layout.shared_gated else 1.0) if split else 0.0
    values = {
        "expert_gate": lambda: routed.gate,
        "expert_up": lambda: routed.up,
        "expert_down": lambda: routed.down,
        "expert_gate_up": lambda: torch.cat([routed.gate, routed.up]).expand(tensor.shape),
        "expert_downs": lambda: routed.down.expand(tensor.shape),
        "shared_gate": lambda: shared.gate,
        "shared_up": lambda: shared.up,
        "shared_gate_up": lambda: torch.cat([shared.gate, shared.up]),
        "shared_down": lambda: factor * shared.down,
    }
    return values[tensor.role]().clone()


def materialise(source: Source, layout: HostLayout, request: HostRequest, folder: Path) -> None:
    tensors = {}
    for tensor in layout.tensors:
        value = (
            follow(tensor.carry, tensor.shape, source.tensors)
            if tensor.carry is not None
            else fill(source, layout, request, tensor)
        )
        assert tuple(value.shape) == tensor.shape, tensor
        tensors[tensor.name] = value.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(layout.config))


def ask(spec: ModelSpec, **changes: Any) -> HostRequest:
    values: dict[str, Any] = {
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "expert_width": spec.intermediate,
        "moe_layers": frozenset(range(spec.layers)),
        **changes,
    }
    return HostRequest(**values)


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def difference(source: Source, host: str, request: HostRequest, folder: Path) -> tuple[float, bool]:
    """Return max |dlogit| / max |logit| and whether the greedy continuation is the same."""
    assert HOSTS[host].reasons(source.spec, request) == []
    layout = HOSTS[host].layout(source.spec, request, "float32")
    materialise(source, layout, request, folder)
    logits, tokens = compute(load(folder))
    worst = (logits - source.logits).abs().max() / source.logits.abs().max()
    return float(worst), torch.equal(tokens, source.tokens)


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
