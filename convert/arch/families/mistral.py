"""Mistral 7B, Nemo and Small."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Rope

FAMILY = Family(
    model_type="mistral",
    stem="Mistral",
    architectures={"MistralForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=32000,
            hidden=4096,
            intermediate=14336,
            layers=32,
            heads=32,
            kv_heads=8,
            positions=4096 * 32,
        ),
        "window": common.window_key(4096),
    },
    tensors=(
        common.EMBED,
        *common.attention(),
        *common.glu(),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits=common.RMS_TRAITS,
    rope=Rope(),
    window="always",
    legacy=common.ROPE_BUFFER,
)
