"""Qwen2 and Qwen2.5: biases on q, k and v, always."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Rope

FAMILY = Family(
    model_type="qwen2",
    stem="Qwen2",
    architectures={"Qwen2ForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=151936,
            hidden=4096,
            intermediate=22016,
            layers=32,
            heads=32,
            kv_heads=32,
            positions=32768,
        ),
        **common.window_keys(),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="always"),
        *common.glu(),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={**common.RMS_TRAITS, "qkv_bias": True},
    masks=common.sliding_mask("windowed and layer >= full_layers"),
    rope=Rope(),
    window="use_window",
    legacy=common.ROPE_BUFFER,
)
