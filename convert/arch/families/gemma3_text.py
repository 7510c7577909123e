"""Gemma 3, text only: query and key norms, five sliding layers to one full, two rotary bases."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Choice, Family, Key, Rope

FAMILY = Family(
    model_type="gemma3_text",
    stem="Gemma3Text",
    architectures={"Gemma3ForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=262208,
            hidden=2304,
            intermediate=9216,
            layers=26,
            heads=8,
            kv_heads=4,
            head_dim=256,
            positions=131072,
            act="gelu_pytorch_tanh",
            act_key="hidden_activation",
            tied=True,
        ),
        **common.GEMMA_KEYS,
        "attention_cap": common.optional_number("attn_logit_softcapping"),
        "logits_cap": common.optional_number("final_logit_softcapping"),
        "pattern": Key(name="sliding_window_pattern", default=6),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.qk_norms(),
        *common.glu(),
        *common.SANDWICH_NORMS,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.GEMMA_TRAITS,
        "qk_norm": "head",
        "softcap": Choice(when="attention_cap or logits_cap", then=True, otherwise=False),
    },
    masks=common.sliding_mask("windowed and ordinal % pattern != 0"),
    rope=Rope(theta=1e6, layered=True, local_theta=1e4, local_key="rope_local_base_freq"),
    window="always",
    checks=("hidden/heads",),
    refusals=common.NOT_CAUSAL,
    legacy=common.ROPE_BUFFER,
)
