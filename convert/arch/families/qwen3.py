"""Qwen3 dense: norms on queries and keys, per head."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Rope

FAMILY = Family(
    model_type="qwen3",
    stem="Qwen3",
    architectures={"Qwen3ForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=151936,
            hidden=4096,
            intermediate=22016,
            layers=32,
            heads=32,
            kv_heads=32,
            head_dim=128,
            positions=32768,
        ),
        **common.window_keys(),
        "attention_bias": common.flag("attention_bias"),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.qk_norms(),
        *common.glu(),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.RMS_TRAITS,
        **common.BIAS_TRAITS,
        "qk_norm": "head",
    },
    masks=common.sliding_mask("windowed and layer >= full_layers"),
    rope=Rope(),
    window="use_window",
    legacy=common.ROPE_BUFFER,
)
