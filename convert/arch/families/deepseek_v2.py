"""DeepSeek-V2: latent attention, dense blocks first, then routed experts beside shared ones.

transformers reads neither norm_topk_prob nor moe_layer_freq: weights are those of the softmax over
all experts times routed_scaling_factor, and every block from first_k_dense_replace on is sparse.
"""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Key, Ref, Rope, Routing

_MLP = "model.layers.{layer}.mlp"
_BIAS = "mlp_bias"

FAMILY = Family(
    model_type="deepseek_v2",
    stem="DeepseekV2",
    architectures={"DeepseekV2ForCausalLM": ()},
    keys={
        "plain": Key(name="qk_nope_head_dim", default=128),
        "rotated": Key(name="qk_rope_head_dim", default=64),
        **common.decoder_keys(
            vocab=102400,
            hidden=4096,
            intermediate=11008,
            layers=32,
            heads=32,
            positions=2048,
        ),
        "attention_bias": common.flag("attention_bias"),
        "mlp_bias": common.flag("mlp_bias"),
        "q_rank": Key(name="q_lora_rank", kind="count", default=1536, fallback="0"),
        "kv_rank": Key(name="kv_lora_rank", default=512),
        "value_dim": Key(name="v_head_dim", default=128),
        # a key of that name is overwritten by the class
        "head_dim": Key(name="", fallback="plain + rotated"),
        "experts": Key(name="n_routed_experts", default=64, aliases=("num_experts",)),
        "top_k": Key(name="num_experts_per_tok"),
        "expert_width": Key(name="moe_intermediate_size", default=1407),
        "shared": common.count("n_shared_experts", 2),
        "first_sparse": common.count("first_k_dense_replace", 0),
        "scaling": common.number("routed_scaling_factor", 1.0),
        "method": Key(name="topk_method", kind="text", default="greedy", nullable=True),
    },
    tensors=(
        common.EMBED,
        *common.latent_attention(
            q_rank="q_rank",
            kv_rank="kv_rank",
            plain="plain",
            rotated="rotated",
            value="value_dim",
            bias="attention_bias",
        ),
        *common.glu(bias=_BIAS, when="not moe"),
        common.router(f"{_MLP}.gate", when="moe"),
        *common.glu(f"{_MLP}.experts.{{expert}}", role="expert_", width="expert_width", when="moe"),
        *common.glu(
            f"{_MLP}.shared_experts",
            role="shared_",
            width="shared*expert_width",
            bias=_BIAS,
            when="moe",
        ),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.RMS_TRAITS,
        **common.BIAS_TRAITS,
        "mlp_bias": Ref(expression=_BIAS),
    },
    masks=common.SIGMOID_MOE_MASK,
    rope=Rope(),
    refusals={"kv_heads != heads": "latent attention has as many heads of keys as of queries"},
    legacy=common.ROPE_BUFFER,
    routing=Routing(renormalised="never", scaling="scaling", float32=True, method="method"),
)
