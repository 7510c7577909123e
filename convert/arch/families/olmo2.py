"""OLMo 2: norms on the outputs of attention and FFN, and over all queries and keys at once."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Rope

FAMILY = Family(
    model_type="olmo2",
    stem="Olmo2",
    architectures={"Olmo2ForCausalLM": ()},
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
    rope=Rope(),
    legacy=common.ROPE_BUFFER,
)
