"""Qwen1.5-MoE and Qwen2-MoE: routed experts, and a shared one behind a sigmoid."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Ref, Rope, Template

_MLP = "model.layers.{layer}.mlp"

FAMILY = Family(
    model_type="qwen2_moe",
    stem="Qwen2Moe",
    architectures={"Qwen2MoeForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=151936,
            hidden=2048,
            intermediate=5632,
            layers=24,
            heads=16,
            kv_heads=16,
            positions=32768,
        ),
        **common.window_keys(),
        **common.qwen_moe_keys(experts=60, top_k=4, width=1408),
        "shared_width": common.count("shared_expert_intermediate_size", 5632),
        "qkv_bias": common.flag("qkv_bias", default=True),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="qkv_bias"),
        *common.glu(when="not moe"),
        common.router(f"{_MLP}.gate", when="moe"),
        *common.glu(f"{_MLP}.experts.{{expert}}", role="expert_", width="expert_width", when="moe"),
        *common.glu(f"{_MLP}.shared_expert", role="shared_", width="shared_width", when="moe"),
        Template(
            role="shared_router",
            name=f"{_MLP}.shared_expert_gate.weight",
            shape="1, hidden",
            when="moe",
        ),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={**common.RMS_TRAITS, "qkv_bias": Ref(expression="qkv_bias")},
    masks={
        **common.QWEN_MOE_MASK,
        **common.sliding_mask("windowed and ordinal % 2 == 1 and layer < full_layers"),
    },
    rope=Rope(),
    window="use_window",
    legacy=common.ROPE_BUFFER,
    routing=common.OPTIONAL_RENORM,
)
