"""Qwen3-MoE: routed experts only, norms on queries and keys, one window for all layers."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Rope

_MLP = "model.layers.{layer}.mlp"

FAMILY = Family(
    model_type="qwen3_moe",
    stem="Qwen3Moe",
    architectures={"Qwen3MoeForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=151936,
            hidden=2048,
            intermediate=6144,
            layers=24,
            heads=32,
            kv_heads=4,
            positions=32768,
        ),
        **common.qwen_moe_keys(experts=128, top_k=8, width=768, aliases=("num_local_experts",)),
        "use_window": common.flag("use_sliding_window"),
        "window": common.window_key(4096),
        "attention_bias": common.flag("attention_bias"),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.qk_norms(),
        *common.glu(when="not moe"),
        common.router(f"{_MLP}.gate", when="moe"),
        *common.glu(f"{_MLP}.experts.{{expert}}", role="expert_", width="expert_width", when="moe"),
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
    masks=common.QWEN_MOE_MASK,
    rope=Rope(),
    window="use_window",
    legacy=common.ROPE_BUFFER,
    routing=common.OPTIONAL_RENORM,
)
