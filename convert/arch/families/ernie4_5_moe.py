"""ERNIE 4.5 MoE: softmax routing with a correction bias, sparse blocks at an interval."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Key, Mask, Ref, Rope, Routing, Template

_MLP = "model.layers.{layer}.mlp"
_BIAS = "use_bias"

FAMILY = Family(
    model_type="ernie4_5_moe",
    stem="Ernie4_5_Moe",
    architectures={"Ernie4_5_MoeForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=103424,
            hidden=2560,
            intermediate=12288,
            layers=28,
            heads=20,
            kv_heads=4,
            positions=131072,
            eps=1e-05,
            tied=True,
        ),
        "use_bias": common.flag("use_bias"),
        "expert_width": Key(name="moe_intermediate_size", default=1536),
        "experts": Key(name="moe_num_experts", default=64, aliases=("num_experts",)),
        "top_k": Key(name="moe_k", default=6, aliases=("num_experts_per_tok",)),
        "shared": common.count("moe_num_shared_experts", 2),
        "moe_start": common.count("moe_layer_start_index", 1),
        "moe_end": Key(
            name="moe_layer_end_index", kind="count", default=-1, dead=-1, fallback="layers"
        ),
        "moe_step": Key(name="moe_layer_interval", default=1),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias=_BIAS, o_bias=_BIAS),
        *common.glu(bias=_BIAS, when="not moe"),
        common.router(f"{_MLP}.gate", when="moe"),
        Template(
            role="score_bias",
            name=f"{_MLP}.moe_statics.e_score_correction_bias",
            shape="1, experts",
            when="moe",
        ),
        *common.glu(f"{_MLP}.experts.{{expert}}", role="expert_", width="expert_width", when="moe"),
        *common.glu(
            f"{_MLP}.shared_experts",
            role="shared_",
            width="shared*expert_width",
            bias=_BIAS,
            when="moe and shared > 0",
        ),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
        Template(role="head_bias", name="lm_head.bias", shape="vocab", when=_BIAS),
    ),
    traits={
        **common.RMS_TRAITS,
        "qkv_bias": Ref(expression=_BIAS),
        "o_bias": Ref(expression=_BIAS),
        "mlp_bias": Ref(expression=_BIAS),
    },
    masks={
        "moe": Mask(default="ordinal % moe_step == 0 and layer >= moe_start and layer <= moe_end")
    },
    rope=Rope(theta=5e5),
    legacy=common.ROPE_BUFFER,
    routing=Routing(unlike="softmax scores with a correction bias"),
)
