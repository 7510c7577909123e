"""Ernie-4.5-MoE: interleaved rotary, one run of MoE blocks, optional shared expert.

Its bias flag also puts biases into dense and shared FFNs, so it is left off.
"""

from __future__ import annotations

from adaconvert.arch.hosts.base import Host, SharedExpert

HOST = Host(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    interleaved=True,
    moe_layers="range",
    shared=SharedExpert(in_units=True),
    router_in_float32=True,
    config={
        "moe_intermediate_size": "$expert_width",
        "moe_num_experts": "$experts",
        "moe_k": "$top_k",
        "moe_num_shared_experts": "$shared_units",
        "moe_layer_start_index": "$first_moe",
        "moe_layer_end_index": "$last_moe",
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "use_bias": False,
    },
)
