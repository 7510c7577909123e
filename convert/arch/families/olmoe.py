"""OLMoE: OLMo with RMSNorm, norms over all queries and keys at once, every block sparse."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Key, Ref, Rope

_MLP = "model.layers.{layer}.mlp"

FAMILY = Family(
    model_type="olmoe",
    stem="Olmoe",
    architectures={"OlmoeForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=50304,
            hidden=2048,
            intermediate=2048,
            layers=16,
            heads=16,
            positions=4096,
            eps=1e-05,
        ),
        "attention_bias": common.flag("attention_bias"),
        "clip_qkv": common.optional_number("clip_qkv"),
        "experts": Key(name="num_experts", default=64, aliases=("num_local_experts",)),
        "top_k": Key(name="num_experts_per_tok", default=8),
        "renorm": common.flag("norm_topk_prob"),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        # sized without head_dim, as the class does
        *common.qk_norms("hidden", "hidden/heads*kv_heads"),
        common.router(f"{_MLP}.gate"),
        *common.glu(f"{_MLP}.experts.{{expert}}", role="expert_"),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.RMS_TRAITS,
        **common.BIAS_TRAITS,
        "qk_norm": "full",
        "clip_qkv": Ref(expression="clip_qkv"),
    },
    rope=Rope(),
    legacy=common.ROPE_BUFFER,
    routing=common.OPTIONAL_RENORM,
)
