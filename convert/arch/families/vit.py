"""ViT: patches instead of tokens, norms before the branches, FFN split over two modules."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Key, Power, Ref, Template

_EMBED = "{p}embeddings"
_BLOCK = "{p}encoder.layer.{layer}"
_SELF = f"{_BLOCK}.attention.attention"

FAMILY = Family(
    model_type="vit",
    stem="ViT",
    kind="vision",
    architectures={
        "ViTModel": ("pooled",),
        "ViTForImageClassification": ("prefixed", "classifier"),
        "ViTForMaskedImageModeling": ("prefixed", "masked"),
    },
    prefix="vit.",
    keys={
        **common.encoder_keys(),
        "image": Key(name="image_size", kind="side", default=224),
        "patch": Key(name="patch_size", kind="side", default=16),
        "side": Key(name="", fallback="image//patch"),
        "channels": Key(name="num_channels", default=3),
        "stride": Key(name="encoder_stride", default=16),
        "pooled_size": Key(name="pooler_output_size", dead=0, fallback="hidden"),
        "qkv_bias": common.flag("qkv_bias", default=True),
    },
    tensors=(
        Template(role="class_token", name=f"{_EMBED}.cls_token", shape="1, 1, hidden"),
        Template(
            role="mask_token", name=f"{_EMBED}.mask_token", shape="1, 1, hidden", when="masked"
        ),
        Template(
            role="pos_embed", name=f"{_EMBED}.position_embeddings", shape="1, side*side + 1, hidden"
        ),
        Template(
            role="patch_embed",
            name=f"{_EMBED}.patch_embeddings.projection.weight",
            shape="hidden, channels, patch, patch",
        ),
        Template(
            role="patch_embed_bias",
            name=f"{_EMBED}.patch_embeddings.projection.bias",
            shape="hidden",
        ),
        *common.layer_norm("attn_norm", f"{_BLOCK}.layernorm_before"),
        *common.linear("q", f"{_SELF}.query", "hidden", "hidden", "qkv_bias"),
        *common.linear("k", f"{_SELF}.key", "hidden", "hidden", "qkv_bias"),
        *common.linear("v", f"{_SELF}.value", "hidden", "hidden", "qkv_bias"),
        *common.linear("o", f"{_BLOCK}.attention.output.dense", "hidden", "hidden", "always"),
        *common.layer_norm("ffn_norm", f"{_BLOCK}.layernorm_after"),
        *common.encoder_ffn(_BLOCK),
        *common.layer_norm("norm_final", "{p}layernorm"),
        *common.head("pooler", "{p}pooler.dense", "pooled_size", "pooled"),
        *common.head("classifier", "classifier", "labels", "classifier"),
        Template(
            role="pixel_head",
            name="decoder.0.weight",
            shape="stride*stride*channels, hidden, 1, 1",
            when="masked",
        ),
        Template(
            role="pixel_head_bias",
            name="decoder.0.bias",
            shape="stride*stride*channels",
            when="masked",
        ),
    ),
    traits={
        **common.PLAIN_TRAITS,
        "qkv_bias": Ref(expression="qkv_bias"),
        "o_bias": True,
        "attention_scale": Power(base="head_dim", exponent=-0.5),
        "activation": Ref(expression="act"),
    },
    site=common.ONE_MODULE_SITE,
    legacy={r"(vit\.)?pooler\..*": "head the stated architecture does not have"},
)
