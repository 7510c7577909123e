"""Gemma 1: norm weights stored minus one, embeddings scaled, tied head."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Key, Power, Rope

FAMILY = Family(
    model_type="gemma",
    stem="Gemma",
    architectures={"GemmaForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=256000,
            hidden=3072,
            intermediate=24576,
            layers=28,
            heads=16,
            kv_heads=16,
            head_dim=256,
            positions=8192,
            tied=True,
        ),
        "act": Key(
            name="hidden_act",
            kind="text",
            default="gelu_pytorch_tanh",
            # the first releases say "gelu" and mean the tanh approximation
            renamed={"gelu": "gelu_pytorch_tanh"},
        ),
        "attention_bias": common.flag("attention_bias"),
        "bidirectional": common.optional_flag("use_bidirectional_attention"),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.glu(),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.RMS_TRAITS,
        **common.BIAS_TRAITS,
        "norm": "rms_plus_one",
        "embed_scale": Power(base="hidden", exponent=0.5),
    },
    rope=Rope(),
    refusals=common.NOT_CAUSAL,
    legacy=common.ROPE_BUFFER,
)
