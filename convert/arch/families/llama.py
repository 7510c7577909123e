"""Llama, and everything published under its model_type (SmolLM2, TinyLlama, Yi, ...)."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Ref, Rope

FAMILY = Family(
    model_type="llama",
    stem="Llama",
    architectures={"LlamaForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=32000, hidden=4096, intermediate=11008, layers=32, heads=32, positions=2048
        ),
        "attention_bias": common.flag("attention_bias"),
        "mlp_bias": common.flag("mlp_bias"),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.glu(bias="mlp_bias"),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.RMS_TRAITS,
        **common.BIAS_TRAITS,
        "mlp_bias": Ref(expression="mlp_bias"),
    },
    rope=Rope(),
    checks=("hidden/heads",),
    legacy=common.ROPE_BUFFER,
)
