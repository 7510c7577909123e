"""GraniteMoE: Granite with every block sparse; experts are fused on disk."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Rope

FAMILY = Family(
    model_type="granitemoe",
    stem="GraniteMoe",
    architectures={"GraniteMoeForCausalLM": ()},
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
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.fused_experts("model.layers.{layer}.block_sparse_moe"),
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
