"""GLM-4.5: dense blocks first, then sigmoid routing; half of each head rotates."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Choice, Family, Ref, Rope

_MLP = "model.layers.{layer}.mlp"

FAMILY = Family(
    model_type="glm4_moe",
    stem="Glm4Moe",
    architectures={"Glm4MoeForCausalLM": ()},
    keys={
        **common.decoder_keys(
            vocab=151552,
            hidden=4096,
            intermediate=10944,
            layers=46,
            heads=96,
            kv_heads=8,
            positions=131072,
            eps=1e-05,
        ),
        **common.sigmoid_moe_keys(experts=128, top_k=8, width=1408, shared=1, dense=1),
        "attention_bias": common.flag("attention_bias"),
        "use_qk_norm": common.flag("use_qk_norm"),
    },
    tensors=(
        common.EMBED,
        *common.attention(qkv_bias="attention_bias"),
        *common.qk_norms(when="use_qk_norm"),
        *common.glu(when="not moe"),
        *common.sigmoid_moe(_MLP),
        common.ATTN_NORM,
        common.FFN_NORM,
        common.FINAL_NORM,
        common.HEAD,
    ),
    traits={
        **common.RMS_TRAITS,
        "qkv_bias": Ref(expression="attention_bias"),
        "qk_norm": Choice(when="use_qk_norm", then="head", otherwise="none"),
    },
    masks=common.SIGMOID_MOE_MASK,
    rope=Rope(partial=0.5),
    legacy=common.ROPE_BUFFER,
    routing=common.SIGMOID_ROUTING,
)
