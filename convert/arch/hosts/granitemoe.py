"""GraniteMoE: four multipliers, biases on q, k, v, o, full attention; experts are fused on disk."""

from __future__ import annotations

from adaconvert.arch.hosts.base import Host

MULTIPLIERS: dict[str, object] = {
    "attention_bias": "$biased",
    "embedding_multiplier": "$embed_scale",
    "residual_multiplier": "$residual_scale",
    "logits_scaling": "$logits_scale",
    "attention_multiplier": "$attention_scale",
}

HOST = Host(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    kin=frozenset({"granite"}),
    biases="qkvo",
    multipliers=True,
    fixed_width=True,
    config=MULTIPLIERS,
)
