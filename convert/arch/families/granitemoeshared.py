"""GraniteMoE with a shared expert beside the routed ones; width 0 means none."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Rope, Template

_BLOCK = "model.layers.{layer}"

FAMILY = Family(
    model_type="granitemoeshared",
    stem="GraniteMoeShared",
    architectures={"GraniteMoeSharedForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=32000,
            hidden=4096,
            intermediate=11008,
            layers=32,
            heads=32,
            positions=2048,
        ),
        **common.GRANITE_KEYS,
        **common.GRANITE_MOE_KEYS,
        "shared_width": common.count("shared_intermediate_size", 0),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.fused_experts(f"{_BLOCK}.block_sparse_moe"),
        Template(
            role="shared_gate_up",
            name=f"{_BLOCK}.shared_mlp.input_linear.weight",
            shape="2*shared_width, hidden",
            when="shared_width > 0",
        ),
        Template(
            role="shared_down",
            name=f"{_BLOCK}.shared_mlp.output_linear.weight",
            shape="hidden, shared_width",
            when="shared_width > 0",
        ),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.RMS_TRAITS,
        **common.GRANITE_TRAITS,
    },
    rope=Rope(),
    legacy=common.ROPE_BUFFER,
    routing=common.GRANITE_ROUTING,
)
