"""FlexOlmo: norms on the branch outputs and over all query and key heads, every block MoE."""

from __future__ import annotations

from adaconvert.arch.hosts.base import Host

HOST = Host(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    kin=frozenset({"olmo2", "olmo3"}),
    norm_placement="post",
    norms=frozenset({"rms"}),
    biases="qkvo",
    qk_norm=frozenset({"full"}),
    fixed_width=True,
    config={"attention_bias": "$biased"},
)
