"""Mixtral: Llama attention, one window for all layers or none, every block MoE."""

from __future__ import annotations

from adaconvert.arch.hosts.base import Host

HOST = Host(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    sliding=frozenset({"none", "uniform"}),
    fixed_width=True,
    config={"sliding_window": "$window", "router_jitter_noise": 0.0},
)
