"""Gemma 2: four norms per block, soft-capped scores and logits, every other layer sliding."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Choice, Family, Rope

FAMILY = Family(
    model_type="gemma2",
    stem="Gemma2",
    architectures={"Gemma2ForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=256000,
            hidden=2304,
            intermediate=9216,
            layers=26,
            heads=8,
            kv_heads=4,
            head_dim=256,
            positions=8192,
            act="gelu_pytorch_tanh",
            act_key="hidden_activation",
            tied=True,
        ),
        **common.GEMMA_KEYS,
        "attention_cap": common.optional_number("attn_logit_softcapping", 50.0),
        "logits_cap": common.optional_number("final_logit_softcapping", 30.0),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.glu(),
        *common.SANDWICH_NORMS,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.GEMMA_TRAITS,
        "softcap": Choice(when="attention_cap or logits_cap", then=True, otherwise=False),
    },
    masks=common.sliding_mask("windowed and ordinal % 2 == 1"),
    rope=Rope(),
    window="always",
    checks=("hidden/heads",),
    refusals=common.NOT_CAUSAL,
    legacy=common.ROPE_BUFFER,
)
