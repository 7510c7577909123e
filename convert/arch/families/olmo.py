"""OLMo 1: LayerNorm without parameters, so the checkpoint holds no norm at all."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Power, Ref, Rope

FAMILY = Family(
    model_type="olmo",
    stem="Olmo",
    architectures={"OlmoForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=50304,
            hidden=4096,
            intermediate=11008,
            layers=32,
            heads=32,
            positions=2048,
            eps=None,
        ),
        "attention_bias": common.flag("attention_bias"),
        "clip_qkv": common.optional_number("clip_qkv"),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.glu(),
        common.HEAD,
    ),
    traits={
        **common.BIAS_TRAITS,
        "norm": "layernorm_no_params",
        "norm_eps": 1e-5,
        "activation": Ref(expression="act"),
        "attention_scale": Power(base="head_dim", exponent=-0.5),
        "clip_qkv": Ref(expression="clip_qkv"),
    },
    rope=Rope(),
    legacy=common.ROPE_BUFFER,
)
