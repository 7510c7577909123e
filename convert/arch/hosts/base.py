"""What a host file says: which models a stock MoE architecture can hold, and its config.json.

Only data types. `fit` compares a model with it, `layout` builds the target from it. A config value
that starts with "$" is replaced by one of the values `layout` computes; everything else is written
as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adaconvert.arch.base import HostLayout, HostRequest, ModelSpec

#: norms a host with RMSNorm before each branch can hold, the last two after adapting weights.
PRE_NORMS = frozenset({"rms", "rms_plus_one", "layernorm_no_params"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExpert:
    """The always-on expert of a host.

    Attributes:
        gated: its output is multiplied by sigmoid(shared_router . x).
        required: a block cannot be built without one.
        in_units: its width is a whole number of routed-expert widths.
        spare_width: width of the neutral one that is added when it is required but not asked for;
            0 means the width of a routed expert.
    """

    gated: bool = False
    required: bool = False
    in_units: bool = False
    spare_width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One MoE architecture, as data; every claim was read in its code in transformers 5.23.

    Attributes:
        model_type, architecture: as in config.json.
        kin: dense families this host was made for; it is preferred for them.
        norm_placement, norms: where its norms sit and which norms of a source become them.
        biases: projections that have a bias when its bias flag is on: "qkv", "qkvo", "" for none.
        qk_norm: values of `Traits.qk_norm` it can hold.
        sliding: values of `Traits.sliding` it can hold.
        partial_rotary: it can rotate part of each head.
        interleaved: it rotates neighbouring elements, so rows of q and k are reordered.
        multipliers: it has Granite's four multipliers.
        moe_layers: "all", "any", "suffix" (dense blocks come first) or "range" (one run of blocks).
        shared: its shared expert, None when it has none.
        fixed_width: every FFN has the width `intermediate_size`, so the routed experts get it.
        combine: as in `HostLayout`.
        router_in_float32: router logits are computed in float32 whatever the model's dtype.
        min_experts: smallest number of experts its router can choose from.
        config: keys beyond the common ones.
    """

    model_type: str
    architecture: str
    kin: frozenset[str] = frozenset()
    norm_placement: str = "pre"
    norms: frozenset[str] = PRE_NORMS
    biases: str = ""
    qk_norm: frozenset[str] = frozenset({"none"})
    sliding: frozenset[str] = frozenset({"none"})
    partial_rotary: bool = False
    interleaved: bool = False
    multipliers: bool = False
    moe_layers: str = "all"
    shared: SharedExpert | None = None
    fixed_width: bool = False
    combine: str = "renorm"
    router_in_float32: bool = False
    min_experts: int = 1
    config: Mapping[str, object] = field(default_factory=dict)

    def reasons(self, spec: ModelSpec, request: HostRequest) -> list[str]:
        """Return why this host cannot hold the model exactly, one clause each; none when it can."""
        from adaconvert.arch import fit

        return fit.reasons(self, spec, request)

    def layout(self, spec: ModelSpec, request: HostRequest, dtype_name: str) -> HostLayout:
        """Return the target: config.json, every tensor, and where the carried ones come from.

        Args:
            spec: the dense source; `reasons` must be empty for it.
            request: what the method wants. No `moe_layers` means every block.
            dtype_name: stored dtype, as in config.json ("bfloat16") or headers ("BF16").
        """
        from adaconvert.arch import layout

        return layout.build(self, spec, request, dtype_name)
