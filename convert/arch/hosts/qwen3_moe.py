"""Qwen3-MoE: a norm on each query and key head, one window or none, any block may stay dense."""

from __future__ import annotations

from adaconvert.arch.hosts.base import Host

HOST = Host(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    kin=frozenset({"qwen3"}),
    biases="qkvo",
    qk_norm=frozenset({"head"}),
    sliding=frozenset({"none", "uniform"}),
    moe_layers="any",
    config={
        "moe_intermediate_size": "$expert_width",
        "decoder_sparse_step": 1,
        "mlp_only_layers": "$dense_layers",
        "attention_bias": "$biased",
        "use_sliding_window": "$slides",
        "sliding_window": "$window",
        "max_window_layers": "$full_layers",
    },
)
