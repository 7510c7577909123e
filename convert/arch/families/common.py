"""Pieces that many decoder families share: keys, templates and reasons.

What differs between families has no default here, so that every family file states its own.
"""

from __future__ import annotations

from adaconvert.arch.family import Key, Mask, Power, Ref, Routing, Site, Template

ROPE_BUFFER = {
    r".*\.rotary_emb\.inv_freq": "rotary buffer, computed from config.json",
    r".*\.rotary_emb\.(cos|sin)_cached": "rotary buffer, computed from config.json",
}


def decoder_keys(
    *,
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    eps: float | None = 1e-6,
    act: str = "silu",
    tied: bool = False,
    act_key: str = "hidden_act",
) -> dict[str, Key]:
    """Return the keys of a Llama-like decoder, with the defaults of one family."""
    norm_eps = {} if eps is None else {"eps": number("rms_norm_eps", eps)}
    return {
        **norm_eps,
        "vocab": Key(name="vocab_size", default=vocab),
        "hidden": Key(name="hidden_size", default=hidden),
        "intermediate": Key(name="intermediate_size", default=intermediate),
        "layers": Key(name="num_hidden_layers", default=layers),
        "heads": Key(name="num_attention_heads", default=heads),
        "kv_heads": Key(name="num_key_value_heads", default=kv_heads, fallback="heads"),
        "head_dim": Key(name="head_dim", default=head_dim, fallback="hidden/heads"),
        "positions": Key(name="max_position_embeddings", default=positions),
        "act": Key(name=act_key, kind="text", default=act),
        "tied": flag("tie_word_embeddings", default=tied),
    }


def flag(name: str, *, default: bool = False) -> Key:
    """Return the key of a yes or no."""
    return Key(name=name, kind="flag", default=default)


def optional_flag(name: str) -> Key:
    """Return the key of a yes or no that may be null, which is no."""
    return Key(name=name, kind="flag", nullable=True)


def number(name: str, default: float) -> Key:
    """Return the key of a number."""
    return Key(name=name, kind="number", default=default)


def optional_number(name: str, default: float | None = None) -> Key:
    """Return the key of a number that may be null."""
    return Key(name=name, kind="number", default=default, nullable=True)


def window_key(default: int | None) -> Key:
    """Return the key of an attention window; null and 0 are none."""
    return Key(name="sliding_window", default=default, nullable=True, dead=0)


def window_keys(*, default: int | None = 4096, last_full: int = 28) -> dict[str, Key]:
    """Return the keys by which the Qwen families state their window."""
    return {
        "use_window": flag("use_sliding_window"),
        "window": window_key(default),
        "full_layers": Key(name="max_window_layers", kind="count", default=last_full),
    }


def sliding_mask(default: str) -> dict[str, Mask]:
    """Return the mask of sliding layers: `layer_types` where the config has it, else `default`."""
    others = ("full_attention", "attention")
    return {
        "sliding": Mask(
            key="layer_types", value="sliding_attention", default=default, others=others
        )
    }


def count(name: str, default: int | None) -> Key:
    """Return the key of a whole number that may be 0."""
    return Key(name=name, kind="count", default=default)


def qwen_moe_keys(
    *, experts: int, top_k: int, width: int, aliases: tuple[str, ...] = ()
) -> dict[str, Key]:
    """Return the keys by which the Qwen families say which blocks are sparse, and how."""
    return {
        "experts": Key(name="num_experts", kind="count", default=experts, aliases=aliases),
        "top_k": Key(name="num_experts_per_tok", default=top_k),
        "expert_width": Key(name="moe_intermediate_size", default=width),
        "renorm": flag("norm_topk_prob"),
        "sparse_step": Key(name="decoder_sparse_step", default=1),
        "dense_layers": Key(name="mlp_only_layers", kind="list", default=[]),
    }


#: the weights of the chosen experts are divided by their sum where the config says so.
OPTIONAL_RENORM = Routing(renormalised="renorm")
#: the k best logits, and their softmax.
GRANITE_ROUTING = Routing(path="model.layers.{layer}.block_sparse_moe", router="router")
SIGMOID_ROUTING = Routing(unlike="sigmoid scores with a correction bias")

QWEN_MOE_MASK = {
    "moe": Mask(default="layer not in dense_layers and experts > 0 and ordinal % sparse_step == 0")
}


def linear(role: str, stem: str, out: str, into: str, bias: str = "never") -> tuple[Template, ...]:
    """Return a weight [out, into] and, where the condition `bias` holds, its bias [out]."""
    return (
        Template(role=role, name=f"{stem}.weight", shape=f"{out}, {into}"),
        Template(role=f"{role}_bias", name=f"{stem}.bias", shape=out, when=bias),
    )


def conv1d(role: str, stem: str, into: str, out: str) -> tuple[Template, ...]:
    """Return a weight stored [in, out] and its bias [out], as GPT-2 has them."""
    return (
        Template(role=role, name=f"{stem}.weight", shape=f"{into}, {out}", transposed=True),
        Template(role=f"{role}_bias", name=f"{stem}.bias", shape=out),
    )


def layer_norm(role: str, stem: str) -> tuple[Template, ...]:
    """Return weight and bias of a LayerNorm over the hidden size."""
    return (
        Template(role=role, name=f"{stem}.weight", shape="hidden"),
        Template(role=f"{role}_bias", name=f"{stem}.bias", shape="hidden"),
    )


def norm(role: str, stem: str, size: str = "hidden", when: str = "") -> Template:
    """Return the weight of an RMSNorm."""
    return Template(role=role, name=f"{stem}.weight", shape=size, when=when)


def attention(*, qkv_bias: str = "never", o_bias: str = "never") -> tuple[Template, ...]:
    """Return the four projections of Llama-like attention."""
    stem = "model.layers.{layer}.self_attn"
    return (
        *linear("q", f"{stem}.q_proj", "heads*head_dim", "hidden", qkv_bias),
        *linear("k", f"{stem}.k_proj", "kv_heads*head_dim", "hidden", qkv_bias),
        *linear("v", f"{stem}.v_proj", "kv_heads*head_dim", "hidden", qkv_bias),
        *linear("o", f"{stem}.o_proj", "hidden", "heads*head_dim", o_bias),
    )


def qk_norms(
    q_size: str = "head_dim", k_size: str = "head_dim", when: str = ""
) -> tuple[Template, ...]:
    """Return the norms on queries and keys."""
    stem = "model.layers.{layer}.self_attn"
    return (
        norm("q_norm", f"{stem}.q_norm", q_size, when),
        norm("k_norm", f"{stem}.k_norm", k_size, when),
    )


def latent_attention(
    *, q_rank: str, kv_rank: str, plain: str, rotated: str, value: str, bias: str
) -> tuple[Template, ...]:
    """Return the projections of attention whose keys and values pass a narrow layer (MLA).

    Args:
        q_rank: size of that layer for queries; 0 where they have none.
        kv_rank: size of that layer for keys and values.
        plain: size of a head of queries and keys that positions leave alone.
        rotated: size of the part they rotate; one for all heads of keys.
        value: size of a head of values.
        bias: condition under which the first of two matrices and the output have biases.
    """
    stem = "model.layers.{layer}.self_attn"
    queries, keys = f"heads*{plain} + heads*{rotated}", f"heads*{plain} + heads*{value}"
    narrow = (
        *linear("q_down", f"{stem}.q_a_proj", q_rank, "hidden", bias),
        norm("q_down_norm", f"{stem}.q_a_layernorm", q_rank),
        *linear("q_up", f"{stem}.q_b_proj", queries, q_rank),
    )
    whole = linear("q", f"{stem}.q_proj", queries, "hidden")
    return (
        *(_also(part, f"{q_rank} > 0") for part in narrow),
        *(_also(part, f"{q_rank} == 0") for part in whole),
        *linear("kv_down", f"{stem}.kv_a_proj_with_mqa", f"{kv_rank} + {rotated}", "hidden", bias),
        norm("kv_down_norm", f"{stem}.kv_a_layernorm", kv_rank),
        *linear("kv_up", f"{stem}.kv_b_proj", keys, kv_rank),
        *linear("o", f"{stem}.o_proj", "hidden", f"heads*{value}", bias),
    )


def glu(
    stem: str = "model.layers.{layer}.mlp",
    *,
    role: str = "",
    width: str = "intermediate",
    bias: str = "never",
    when: str = "",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Template, ...]:
    """Return a gated FFN of `width` neurons; `role` is "", "expert_" or "shared_"."""
    gate, up, down = names
    parts = (
        *linear(f"{role}gate", f"{stem}.{gate}", width, "hidden", bias),
        *linear(f"{role}up", f"{stem}.{up}", width, "hidden", bias),
        *linear(f"{role}down", f"{stem}.{down}", "hidden", width, bias),
    )
    return tuple(_also(part, when) for part in parts)


def _also(part: Template, when: str) -> Template:
    both = " and ".join(text for text in (when, part.when) if text)
    return Template(role=part.role, name=part.name, shape=part.shape, when=both)


def encoder_keys() -> dict[str, Key]:
    """Return the keys BERT and ViT share, whose defaults agree."""
    return {
        "hidden": Key(name="hidden_size", default=768),
        "intermediate": Key(name="intermediate_size", default=3072),
        "layers": Key(name="num_hidden_layers", default=12),
        "heads": Key(name="num_attention_heads", default=12),
        "head_dim": Key(name="", fallback="hidden/heads"),
        "eps": number("layer_norm_eps", 1e-12),
        "act": Key(name="hidden_act", kind="text", default="gelu"),
        "labels": Key(name="id2label", kind="labels", aliases=("num_labels",), default=2),
    }


def encoder_ffn(stem: str) -> tuple[Template, ...]:
    """Return the two halves of an encoder's FFN."""
    return (
        *linear("up", f"{stem}.intermediate.dense", "intermediate", "hidden", "always"),
        *linear("down", f"{stem}.output.dense", "hidden", "intermediate", "always"),
    )


#: transformers 5 keeps the two halves in one module and renames them as it loads them (ViT).
ONE_MODULE_SITE = Site(
    path="{p}layers.{layer}.mlp",
    stored="{p}encoder.layer.{layer}.mlp",
    children={"up": "fc1", "down": "fc2"},
    attention={role: f"{{p}}layers.{{layer}}.attention.{role}_proj" for role in "qkvo"},
)


def head(role: str, stem: str, out: str, when: str) -> tuple[Template, ...]:
    """Return weight and bias of a head that only some architectures have."""
    return tuple(_also(part, when) for part in linear(role, stem, out, "hidden", "always"))


def head_norm(role: str, stem: str, when: str) -> tuple[Template, ...]:
    """Return the LayerNorm of such a head."""
    return tuple(_also(part, when) for part in layer_norm(role, stem))


def router(stem: str, when: str = "") -> Template:
    """Return the router [experts, hidden]."""
    return Template(role="router", name=f"{stem}.weight", shape="experts, hidden", when=when)


def fused_experts(stem: str) -> tuple[Template, ...]:
    """Return GraniteMoE's router and experts, fused on disk: gate rows, then up rows, then down."""
    return (
        router(f"{stem}.router.layer"),
        Template(
            role="expert_gate_up",
            name=f"{stem}.input_linear.weight",
            shape="experts, 2*intermediate, hidden",
        ),
        Template(
            role="expert_downs",
            name=f"{stem}.output_linear.weight",
            shape="experts, hidden, intermediate",
        ),
    )


def sigmoid_moe_keys(
    *, experts: int | None, top_k: int | None, width: int, shared: int | None, dense: int
) -> dict[str, Key]:
    """Return the keys of the DeepSeek-like families; a default of None has to be in the config."""
    return {
        "experts": Key(name="n_routed_experts", default=experts, aliases=("num_local_experts",)),
        "top_k": Key(name="num_experts_per_tok", default=top_k),
        "expert_width": Key(name="moe_intermediate_size", default=width),
        "shared": count("n_shared_experts", shared),
        "first_sparse": count("first_k_dense_replace", dense),
    }


def sigmoid_moe(stem: str) -> tuple[Template, ...]:
    """Return router, score bias, routed and shared experts of the DeepSeek-like families."""
    return (
        router(f"{stem}.gate", when="moe"),
        Template(
            role="score_bias",
            name=f"{stem}.gate.e_score_correction_bias",
            shape="experts",
            when="moe",
        ),
        *glu(f"{stem}.experts.{{expert}}", role="expert_", width="expert_width", when="moe"),
        *glu(f"{stem}.shared_experts", role="shared_", width="shared*expert_width", when="moe"),
    )


SIGMOID_MOE_MASK = {"moe": Mask(default="layer >= first_sparse")}
GRANITE_MOE_KEYS = {
    "experts": Key(name="num_local_experts", default=8),
    "top_k": Key(name="num_experts_per_tok", default=2),
}
GRANITE_KEYS = {
    "embed_multiplier": number("embedding_multiplier", 1.0),
    "logits_divisor": number("logits_scaling", 1.0),
    "residual_multiplier": number("residual_multiplier", 1.0),
    "attention_multiplier": number("attention_multiplier", 1.0),
    "attention_bias": flag("attention_bias"),
}
GRANITE_TRAITS: dict[str, object] = {
    "embed_scale": Ref(expression="embed_multiplier"),
    "logits_scale": Ref(expression="logits_divisor"),
    "residual_scale": Ref(expression="residual_multiplier"),
    "attention_scale": Ref(expression="attention_multiplier"),
    "qkv_bias": Ref(expression="attention_bias"),
    "o_bias": Ref(expression="attention_bias"),
}

#: norms on the outputs of attention and FFN (OLMo-2, OLMo-3, FlexOlmo).
OUTPUT_NORMS = (
    norm("post_attn_norm", "model.layers.{layer}.post_attention_layernorm"),
    norm("post_ffn_norm", "model.layers.{layer}.post_feedforward_layernorm"),
)
#: norms before and after attention and FFN (Gemma-2, Gemma-3).
SANDWICH_NORMS = (
    norm("attn_norm", "model.layers.{layer}.input_layernorm"),
    norm("post_attn_norm", "model.layers.{layer}.post_attention_layernorm"),
    norm("ffn_norm", "model.layers.{layer}.pre_feedforward_layernorm"),
    norm("post_ffn_norm", "model.layers.{layer}.post_feedforward_layernorm"),
)
NOT_CAUSAL = {"bidirectional": "attention that sees later tokens is not supported"}

EMBED = Template(role="embed", name="model.embed_tokens.weight", shape="vocab, hidden")
ATTN_NORM = norm("attn_norm", "model.layers.{layer}.input_layernorm")
FFN_NORM = norm("ffn_norm", "model.layers.{layer}.post_attention_layernorm")
FINAL_NORM = norm("norm_final", "model.norm")
HEAD = Template(role="head", name="lm_head.weight", shape="vocab, hidden", optional="tied")

#: traits every decoder with an RMSNorm and attention biases reads off its keys.
BIAS_TRAITS: dict[str, object] = {
    "qkv_bias": Ref(expression="attention_bias"),
    "o_bias": Ref(expression="attention_bias"),
}
#: traits every RMSNorm decoder reads off its keys.
RMS_TRAITS: dict[str, object] = {
    "norm_eps": Ref(expression="eps"),
    "activation": Ref(expression="act"),
    "attention_scale": Power(base="head_dim", exponent=-0.5),
}
GEMMA_KEYS = {
    "attention_bias": flag("attention_bias"),
    "score_scalar": Key(name="query_pre_attn_scalar", kind="number", default=256),
    "window": window_key(4096),
    "bidirectional": optional_flag("use_bidirectional_attention"),
}
#: traits of Gemma 2 and 3.
GEMMA_TRAITS: dict[str, object] = {
    **RMS_TRAITS,
    **BIAS_TRAITS,
    "norm": "rms_plus_one",
    "norm_placement": "sandwich",
    "embed_scale": Power(base="hidden", exponent=0.5),
    "attention_scale": Power(base="score_scalar", exponent=-0.5),
}
#: traits of the families with LayerNorm and an ungated FFN with biases.
PLAIN_TRAITS: dict[str, object] = {
    "norm": "layernorm",
    "norm_eps": Ref(expression="eps"),
    "ffn": "plain",
    "mlp_bias": True,
}
