"""OLMo 3: OLMo 2 with three sliding layers to one full."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Rope

FAMILY = Family(
    model_type="olmo3",
    stem="Olmo3",
    architectures={"Olmo3ForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=50304,
            hidden=4096,
            intermediate=11008,
            layers=32,
            heads=32,
            positions=2048,
            eps=1e-05,
        ),
        "attention_bias": common.flag("attention_bias"),
        "window": common.window_key(4096),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.qk_norms("heads*head_dim", "kv_heads*head_dim"),
        *common.glu(),
        *common.OUTPUT_NORMS,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.RMS_TRAITS,
        **common.BIAS_TRAITS,
        "norm_placement": "post",
        "qk_norm": "full",
    },
    masks=common.sliding_mask("windowed and ordinal % 4 != 0"),
    rope=Rope(theta=5e5, layered=True, local_theta=5e5),
    window="always",
    legacy=common.ROPE_BUFFER,
)
