"""GLM-4-MoE: partial rotary, biases on q, k, v, optional head norms, dense blocks first.

`partial_rotary_factor` defaults to 0.5, `first_k_dense_replace` to 1 and the multi-token-prediction
layers to 1, so all three are always written.
"""

from __future__ import annotations

from adaconvert.arch.hosts.base import Host, SharedExpert

#: one group, no scaling: the scores of the chosen experts are divided by their sum, nothing else.
SIGMOID_ROUTER: dict[str, object] = {
    "n_routed_experts": "$experts",
    "n_shared_experts": "$shared_units",
    "moe_intermediate_size": "$expert_width",
    "first_k_dense_replace": "$first_moe",
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": "$biased",
}

HOST = Host(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    biases="qkv",
    qk_norm=frozenset({"none", "head"}),
    partial_rotary=True,
    moe_layers="suffix",
    shared=SharedExpert(required=True, in_units=True),
    combine="sigmoid",
    # the best group is found by its two best experts
    min_experts=2,
    router_in_float32=True,
    config={
        **SIGMOID_ROUTER,
        "use_qk_norm": "$qk_norm",
        "num_mtp_layers": 0,
        "num_nextn_predict_layers": 0,
    },
)
