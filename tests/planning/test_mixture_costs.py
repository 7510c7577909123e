"""Costs of mixtures of experts: what their authors state, and attention counted by hand."""

from __future__ import annotations

import pytest
import torch

from adaconvert.arch import registry
from adaconvert.modeling import adaptive_costs
from adaconvert.planning.estimate import Costs, attention_flops, costs
from adaconvert.testing.tiny_models import build, config_values

LITE: dict[str, object] = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "num_attention_heads": 16,
}
LARGE: dict[str, object] = {
    "model_type": "deepseek_v2",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "first_k_dense_replace": 1,
    "num_attention_heads": 128,
    "topk_method": "group_limited_greedy",
}
OLMOE: dict[str, object] = {"model_type": "olmoe", "intermediate_size": 1024}


def cost_of(config: dict[str, object]) -> Costs:
    spec = registry.describe(config)
    return costs(spec, {tensor.name: "BF16" for tensor in spec.tensors}, context=0)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        # the model cards of DeepSeek-V2-Lite, DeepSeek-V2 and OLMoE-1B-7B; that of OLMoE says 1.3
        # with the embedding, of which a token reads one row
        (LITE, 15.7, 2.4),
        (LARGE, 236, 21),
        (OLMOE, 6.9, 1.2),
    ],
)
def test_parameters_are_those_the_authors_state(
    config: dict[str, object], total: float, active: float
) -> None:
    found = cost_of(config)
    assert round(found.total_params / 1e9, 1 if total < 100 else None) == total
    assert abs(found.active_params / 1e9 - active) < 0.03 * active


@pytest.mark.parametrize("name", ["deepseek_v2", "olmoe"])
def test_attention_counts_heads_of_queries_and_of_values(name: str) -> None:
    spec = registry.describe({"model_type": name, **config_values(name)})
    # 4 heads; queries 12 + 4 and values 10 in DeepSeek-V2, 8 and 8 in OLMoE
    heads = 16 + 10 if name == "deepseek_v2" else 8 + 8
    seen = 5 * 6 // 2
    assert attention_flops(spec, {5: 1}) * 5 == 2 * 4 * heads * seen * spec.layers
    model = build(name, config_values(name))
    lengths = torch.arange(1, 6)
    assert adaptive_costs.attention_flops(model.config, lengths) == (
        2 * 4 * heads * seen * spec.layers
    )


def test_the_matrices_of_latent_attention_are_counted() -> None:
    values = config_values("deepseek_v2", layers=1)
    spec = registry.describe({"model_type": "deepseek_v2", **values})
    narrow = {t.role: t.shape for t in spec.tensors if t.role.startswith(("q_", "kv_"))}
    assert narrow == {
        "q_down": (24, 32),
        "q_down_norm": (24,),
        "q_up": (64, 24),
        "kv_down": (24, 32),
        "kv_down_norm": (20,),
        "kv_up": (88, 20),
    }
    found = costs(spec, {tensor.name: "F32" for tensor in spec.tensors}, context=0)
    attention = 24 * 32 + 64 * 24 + 24 * 32 + 88 * 20 + 32 * 40
    assert found.flops == 2 * (attention + 3 * 64 * 32 + 320 * 32)
