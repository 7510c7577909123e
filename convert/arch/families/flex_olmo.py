"""FlexOlmo: OLMo 2 with every block sparse."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Key, Rope

_MLP = "model.layers.{layer}.mlp"

FAMILY = Family(
    model_type="flex_olmo",
    stem="FlexOlmo",
    architectures={"FlexOlmoForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=100352,
            hidden=4096,
            intermediate=11008,
            layers=32,
            heads=32,
            positions=4096,
        ),
        "attention_bias": common.flag("attention_bias"),
        "experts": Key(name="num_experts", default=7, aliases=("num_local_experts",)),
        "top_k": Key(name="num_experts_per_tok", default=5),
        "renorm": common.flag("norm_topk_prob"),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias", o_bias="attention_bias"),
        *common.qk_norms("heads*head_dim", "kv_heads*head_dim"),
        common.router(f"{_MLP}.gate"),
        *common.glu(f"{_MLP}.experts.{{expert}}", role="expert_"),
        *common.OUTPUT_NORMS,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.RMS_TRAITS,
        **common.BIAS_TRAITS,
        "norm_placement": "post",
        "qk_norm": "full",
    },
    rope=Rope(theta=5e5),
    legacy=common.ROPE_BUFFER,
    routing=common.OPTIONAL_RENORM,
)
