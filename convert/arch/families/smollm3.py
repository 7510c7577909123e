"""SmolLM3: Llama in which every fourth layer has no rotary positions."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Key, Mask, Ref, Rope

FAMILY = Family(
    model_type="smollm3",
    stem="SmolLM3",
    architectures={"SmolLM3ForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=128256,
            hidden=2048,
            intermediate=11008,
            layers=36,
            heads=16,
            kv_heads=4,
            positions=32768,
            tied=True,
        ),
        "use_window": common.flag("use_sliding_window"),
        "window": common.window_key(None),
        "attention_bias": common.flag("attention_bias"),
        "mlp_bias": common.flag("mlp_bias"),
        "nope_step": Key(name="no_rope_layer_interval", default=4),
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
    masks={
        "roped": Mask(
            key="no_rope_layers",
            value=1,
            others=(0,),
            exact=False,
            default="ordinal % nope_step != 0",
        ),
        **common.sliding_mask("use_window and windowed and not roped"),
    },
    rope=Rope(theta=2e6),
    window="always",
    legacy=common.ROPE_BUFFER,
)
