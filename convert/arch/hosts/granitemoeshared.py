"""GraniteMoE with an always-on expert that no gate scales; 0 is a valid width for it."""

from __future__ import annotations

from adaconvert.arch.hosts.base import Host, SharedExpert
from adaconvert.arch.hosts.granitemoe import MULTIPLIERS

HOST = Host(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    kin=frozenset({"granite"}),
    biases="qkvo",
    multipliers=True,
    shared=SharedExpert(),
    fixed_width=True,
    config={**MULTIPLIERS, "shared_intermediate_size": "$shared_width"},
)
