"""GPT-NeoX and Pythia: parallel residual, partial rotary, q, k and v of each head side by side."""

from adaconvert.arch.families import common
from adaconvert.arch.family import Choice, Family, Key, Power, Ref, Rope, Template

_BLOCK = "gpt_neox.layers.{layer}"

FAMILY = Family(
    model_type="gpt_neox",
    stem="GPTNeoX",
    architectures={"GPTNeoXForCausalLM": ()},
    keys={
        "vocab": Key(name="vocab_size", default=50432),
        "hidden": Key(name="hidden_size", default=6144),
        "intermediate": Key(name="intermediate_size", default=24576),
        "layers": Key(name="num_hidden_layers", default=44),
        "heads": Key(name="num_attention_heads", default=64),
        "head_dim": Key(name="", fallback="hidden/heads"),
        "positions": Key(name="max_position_embeddings", default=2048),
        "eps": common.number("layer_norm_eps", 1e-5),
        "act": Key(name="hidden_act", kind="text", default="gelu"),
        "attention_bias": common.flag("attention_bias", default=True),
        "parallel": common.flag("use_parallel_residual", default=True),
        "tied": common.flag("tie_word_embeddings"),
    },
    tensors=(
        Template(role="embed", name="gpt_neox.embed_in.weight", shape="vocab, hidden"),
        *common.layer_norm("attn_norm", f"{_BLOCK}.input_layernorm"),
        *common.layer_norm("ffn_norm", f"{_BLOCK}.post_attention_layernorm"),
        *common.linear(
            "qkv_by_head",
            f"{_BLOCK}.attention.query_key_value",
            "3*hidden",
            "hidden",
            "attention_bias",
        ),
        *common.linear("o", f"{_BLOCK}.attention.dense", "hidden", "hidden", "attention_bias"),
        *common.linear("up", f"{_BLOCK}.mlp.dense_h_to_4h", "intermediate", "hidden", "always"),
        *common.linear("down", f"{_BLOCK}.mlp.dense_4h_to_h", "hidden", "intermediate", "always"),
        *common.layer_norm("norm_final", "gpt_neox.final_layer_norm"),
        Template(role="head", name="embed_out.weight", shape="vocab, hidden", optional="tied"),
    ),
    traits={
        **common.PLAIN_TRAITS,
        **common.BIAS_TRAITS,
        "norm_placement": Choice(when="parallel", then="parallel", otherwise="pre"),
        "attention_scale": Power(base="head_dim", exponent=-0.5),
        "activation": Ref(expression="act"),
    },
    rope=Rope(theta_key="rotary_emb_base", partial=0.25, partial_key="rotary_pct"),
    legacy={
        r".*\.attention\.(masked_)?bias": "causal mask, computed by the model",
        r".*\.rotary_emb\.inv_freq": "rotary buffer, computed from config.json",
    },
)
