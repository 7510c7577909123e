"""dots.llm1: sigmoid routing with shared experts, norms on queries and keys."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Rope

_MLP = "model.layers.{layer}.mlp"

FAMILY = Family(
    model_type="dots1",
    stem="Dots1",
    architectures={"Dots1ForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=152064,
            hidden=4608,
            intermediate=10944,
            layers=62,
            heads=32,
            kv_heads=32,
            positions=2048,
        ),
        **common.sigmoid_moe_keys(experts=None, top_k=None, width=1408, shared=None, dense=0),
        "window": common.window_key(4096),
        "full_layers": common.count("max_window_layers", 62),
        "attention_bias": common.flag("attention_bias"),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.qk_norms(),
        *common.glu(when="not moe"),
        *common.sigmoid_moe(_MLP),
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
    masks={
        **common.SIGMOID_MOE_MASK,
        **common.sliding_mask("windowed and layer >= full_layers"),
    },
    rope=Rope(),
    window="always",
    legacy=common.ROPE_BUFFER,
    routing=common.SIGMOID_ROUTING,
)
