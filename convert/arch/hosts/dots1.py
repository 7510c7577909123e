"""Dots1: norms on query and key heads, windows per layer, dense blocks first; sigmoid router."""

from __future__ import annotations

from adaconvert.arch.hosts.base import Host, SharedExpert
from adaconvert.arch.hosts.glm4_moe import SIGMOID_ROUTER

HOST = Host(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    biases="qkvo",
    qk_norm=frozenset({"head"}),
    sliding=frozenset({"none", "uniform", "per_layer"}),
    moe_layers="suffix",
    shared=SharedExpert(required=True, in_units=True),
    combine="sigmoid",
    min_experts=2,
    router_in_float32=True,
    config={
        **SIGMOID_ROUTER,
        "sliding_window": "$window",
        "max_window_layers": "$full_layers",
        "layer_types": "$layer_types",
    },
)
