"""GPT-2: learned positions, plain FFN, matrices stored [in, out], q|k|v columns in one tensor."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Family, Key, Power, Ref, Template

_BLOCK = "{p}h.{layer}"

FAMILY = Family(
    model_type="gpt2",
    stem="GPT2",
    architectures={"GPT2LMHeadModel": ("prefixed",)},
    prefix="transformer.",
    # the files on the hub were saved from the body alone
    bare=True,
    keys={
        "vocab": Key(name="vocab_size", default=50257),
        "hidden": Key(name="n_embd", default=768, aliases=("hidden_size",)),
        "layers": Key(name="n_layer", default=12, aliases=("num_hidden_layers",)),
        "heads": Key(name="n_head", default=12, aliases=("num_attention_heads",)),
        "head_dim": Key(name="", fallback="hidden/heads"),
        "intermediate": Key(name="n_inner", fallback="4*hidden"),
        "positions": Key(name="n_positions", default=1024, aliases=("max_position_embeddings",)),
        "eps": common.number("layer_norm_epsilon", 1e-5),
        "act": Key(name="activation_function", kind="text", default="gelu_new"),
        "scaled": common.flag("scale_attn_weights", default=True),
        "cross_attention": common.flag("add_cross_attention"),
        "tied": common.flag("tie_word_embeddings", default=True),
    },
    tensors=(
        Template(role="embed", name="{p}wte.weight", shape="vocab, hidden"),
        Template(role="pos_embed", name="{p}wpe.weight", shape="positions, hidden"),
        *common.layer_norm("attn_norm", f"{_BLOCK}.ln_1"),
        *common.conv1d("qkv", f"{_BLOCK}.attn.c_attn", "hidden", "3*hidden"),
        *common.conv1d("o", f"{_BLOCK}.attn.c_proj", "hidden", "hidden"),
        *common.layer_norm("ffn_norm", f"{_BLOCK}.ln_2"),
        *common.conv1d("up", f"{_BLOCK}.mlp.c_fc", "hidden", "intermediate"),
        *common.conv1d("down", f"{_BLOCK}.mlp.c_proj", "intermediate", "hidden"),
        *common.layer_norm("norm_final", "{p}ln_f"),
        common.HEAD,
    ),
    traits={
        **common.PLAIN_TRAITS,
        "qkv_bias": True,
        "o_bias": True,
        "attention_scale": Power(base="head_dim", exponent=-0.5, when="scaled"),
        "activation": Ref(expression="act"),
    },
    refusals={"cross_attention": "cross-attention is not supported"},
    legacy={
        r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias": "causal mask, computed by the model",
    },
)
