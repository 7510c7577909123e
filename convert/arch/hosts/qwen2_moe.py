"""Qwen2-MoE: biases on q, k, v; windows per layer; any block may be dense; gated shared expert."""

from __future__ import annotations

from adaconvert.arch.hosts.base import Host, SharedExpert

HOST = Host(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    kin=frozenset({"qwen2"}),
    biases="qkv",
    sliding=frozenset({"none", "uniform", "per_layer"}),
    moe_layers="any",
    # 64 neurons: the width a tensor-parallel split over 8 devices in groups of 8 can still cut
    shared=SharedExpert(gated=True, required=True, spare_width=64),
    config={
        "moe_intermediate_size": "$expert_width",
        "shared_expert_intermediate_size": "$shared_width",
        "decoder_sparse_step": 1,
        "mlp_only_layers": "$dense_layers",
        # vLLM always builds these biases and refuses a checkpoint without them, so zeros are stored
        "qkv_bias": True,
        "use_sliding_window": "$slides",
        "sliding_window": "$window",
        "max_window_layers": "$full_layers",
        "layer_types": "$layer_types",
    },
)
