"""The vocabulary of `arch`: what one checkpoint of a model family is, and what a host wants.

Everything here is data about names and shapes: no tensors, no torch, no files.

Roles name what a tensor is for, the same in every family:
  embed, pos_embed, norm_final, norm_final_bias, head, head_bias
  attn_norm, attn_norm_bias, ffn_norm, ffn_norm_bias, post_attn_norm, post_ffn_norm
  q, k, v, o, qkv (fused rows q|k|v) and q_bias, k_bias, v_bias, o_bias, qkv_bias, q_norm, k_norm
  gate, up, down, gate_up (fused rows gate|up) and gate_bias, up_bias, down_bias
  router, expert_gate, expert_up, expert_down, expert_gate_up and expert_downs (fused over experts),
  shared_gate, shared_up, shared_down, shared_gate_up, shared_router, score_bias
  qkv_by_head (GPT-NeoX: rows q|k|v of head 0, then of head 1, ...), type_embed, embed_norm, pooler,
  q_down, q_up and kv_down, kv_up (queries, and keys with values, through a narrow layer with a norm
  q_down_norm, kv_down_norm; kv_down also holds the rows of the rotated key all heads share),
  neuron_order (I32, adaptive checkpoints: where each neuron came from),
  projection_up, projection_down, projection_router (adaptive: a network in place of a projection),
  router_null, null_bias, null_scale, null_value (adaptive: null experts beside a mixture's),
  exit_norm, exit_pooler, exit_head, exit_network, exit_block, exit_map, exit_confidence,
  exit_draft_tokens (I64) (adaptive: what early exits have of their own),
  class_token, mask_token, patch_embed, and heads of encoders: head_transform, head_norm, pair_head,
  span_head, classifier, pixel_head; each with its _bias
A plain (ungated) FFN has `up` and `down` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor a checkpoint of a known family must hold.

    Attributes:
        name: name on disk.
        role: what it is for, see the module docstring.
        shape: sizes implied by config.json.
        layer: index of the block it belongs to, None outside blocks.
        expert: index of the expert it belongs to, None outside per-expert tensors.
        optional: it may be absent (a tied head, say).
        transposed: stored [in, out] instead of [out, in] (GPT-2's Conv1D).
    """

    name: str
    role: str
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    optional: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What decides whether a host can hold a model exactly.

    Attributes:
        norm: "rms", "rms_plus_one" (weight stored minus one), "layernorm", "layernorm_no_params".
        norm_placement: "pre", "post" (OLMo-2: norm on the branch output), "sandwich" (both),
            "parallel" (GPT-NeoX), "post_residual" (BERT: norm on the sum).
        activation: transformers name of the FFN activation.
        ffn: "glu" or "plain".
        qk_norm: "none", "head" (per head), "full" (over all heads at once).
        sliding: "none", "uniform" (one window in every layer), "per_layer".
        partial_rotary: fraction of head_dim that is rotated.
        rope: "none", "one" (one base for all layers), "two" (local and global base), "nope" (some
            layers without).
        rope_type: "default", "llama3", "longrope", "linear", "dynamic", "yarn".
        embed_scale: factor on the embedding output (Gemma: sqrt(hidden_size)).
        residual_scale, logits_scale, attention_scale: Granite's multipliers; attention_scale is the
            factor on q.k, head_dim**-0.5 unless the family sets another; logits are divided by
            logits_scale.
        softcap: attention or final logits are soft-capped.
        clip_qkv: q, k, v are clipped to this magnitude, None when not.
        tied: the head is the embedding.
    """

    norm: str = "rms"
    norm_placement: str = "pre"
    norm_eps: float = 1e-6
    activation: str = "silu"
    ffn: str = "glu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    sliding: str = "none"
    sliding_window: int | None = None
    partial_rotary: float = 1.0
    rope: str = "one"
    rope_type: str = "default"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    attention_scale: float = 0.0
    softcap: bool = False
    clip_qkv: float | None = None
    tied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows [start, start + count) of one tensor: where a matrix lies, fused or not."""

    tensor: str
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One checkpoint of a known family, as its config.json describes it.

    Attributes:
        model_type: family key.
        kind: "decoder", "encoder" or "vision".
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocab: sizes (H, I, L, ...).
        max_positions: longest sequence the config states, 0 when it states none.
        tensors: every tensor, in the family's natural order (embedding, blocks, norm, head).
        legacy: regular expressions of buffers that old files hold and no model reads (dropped with
            a reason).
        num_experts, top_k: 0 for a dense model.
        value_dim: size of a head of values where it is not head_dim, which then is that of queries
            and keys; else 0.
        adaptive: `config.adaptive` of an adaptive checkpoint, None for every other; all else then
            describes the stock model underneath, and `tensors` its own tensors as well.
    """

    model_type: str
    kind: str
    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    traits: Traits
    tensors: tuple[TensorSpec, ...]
    legacy: tuple[str, ...] = ()
    num_experts: int = 0
    top_k: int = 0
    value_dim: int = 0
    config: Mapping[str, object] = field(default_factory=dict)
    adaptive: Mapping[str, object] | None = None

    def ffn_rows(self, layer: int) -> dict[str, Rows]:
        """Return where gate, up and down of a dense block lie; a plain FFN has no "gate".

        Rows of down are its output rows (H of them); gate and up have I rows each.
        """
        found: dict[str, Rows] = {}
        for spec in self.tensors:
            if spec.layer != layer:
                continue
            if spec.role in {"gate", "up", "down"}:
                found[spec.role] = Rows(tensor=spec.name, start=0, count=spec.shape[0])
            elif spec.role == "gate_up":
                half = spec.shape[0] // 2
                found["gate"] = Rows(tensor=spec.name, start=0, count=half)
                found["up"] = Rows(tensor=spec.name, start=half, count=half)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRequest:
    """What a method wants a host architecture to hold.

    Attributes:
        num_experts: routed experts per converted layer (N).
        top_k: routed experts per token.
        expert_width: neurons of each routed expert.
        shared_width: neurons of the shared expert, 0 for none.
        shared_kind: "none", "neutral" (contributes zero), "split" (holds the neurons the routed
            ones lack).
        moe_layers: converted blocks; the others stay dense.
        aux_loss_coef: balance-loss coefficient written to the config.
    """

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int = 0
    shared_kind: str = "none"
    moe_layers: frozenset[int] = frozenset()
    aux_loss_coef: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """How a host tensor that is no part of an FFN is made from the source.

    Attributes:
        tensor: source tensor; None when the host needs a tensor the source lacks (then `fn` is
            "constant").
        rows: (start, count) of its rows, None for the whole tensor.
        fn: None for a plain copy, else a name in `planning.functions`: "plus_one" (w + 1), "scale"
            (factor), "center_rows" (subtract each row's mean), "center_out" (subtract each column's
            mean over rows), "interleave_rope" (heads, head_dim: reorder the rows of q or k from
            half-split to interleaved rotary layout), "constant" (value).
    """

    tensor: str | None
    rows: tuple[int, int] | None = None
    fn: str | None = None
    params: tuple[tuple[str, str | int | float | bool], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTensor:
    """One tensor of the target: either carried over, or an FFN, expert, shared or router tensor the
    method fills.

    Attributes:
        role: as in `ModelSpec`; "expert_gate_up" is [N, 2m, H] (gate rows, then up rows) and
            "expert_downs" [N, H, m] for hosts whose experts are fused on disk.
        carry: set for every role a method does not fill. Dense FFNs of unconverted blocks are
            carried too.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    carry: Carry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLayout:
    """A target checkpoint as a host wants it, before any expert exists.

    Attributes:
        config: the complete config.json of the target, old and new spellings of every key.
        tensors: every target tensor, in the order to write.
        combine: "renorm" (weights of the chosen experts sum to 1) or "sigmoid" (scores divided by
            their sum, times routed_scaling_factor, which is written as 1).
        shared_gated: the shared expert is multiplied by sigmoid(shared_router . x).
        down_fn: function every `down` matrix passes through (OLMo-1's centring), None for none.
        rounds: some carried tensor is computed, so a 16-bit dtype rounds it.
        notes: what the user should know.
    """

    config: dict[str, object]
    tensors: tuple[HostTensor, ...]
    combine: str = "renorm"
    shared_gated: bool = False
    down_fn: str | None = None
    rounds: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeVerdict:
    """What one runtime does with the target.

    Attributes:
        verdict: "right", "refused", "wrong" (loads, then computes wrongly) or "untested".
    """

    runtime: str
    verdict: str
    why: str
