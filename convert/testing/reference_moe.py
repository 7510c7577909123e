"""A mixture-of-experts decoder written from the papers in plain numpy, to hold converted
checkpoints against.

It shares no code with transformers or with the converter: it reads the on-disk names itself, works
in float64, and computes every expert on its own. Identical experts hide routing mistakes; this is
what distinct experts are compared with. It covers every host: mixtral, qwen2_moe, qwen3_moe,
granitemoe, granitemoeshared, flex_olmo, glm4_moe, dots1 and ernie4_5_moe, with dense blocks among
the sparse ones, and default, linear, llama3 and longrope rotary positions.

Shapes: T tokens of one sequence, H hidden size, D head size, N experts, k experts per token.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# float64 arrays; numpy types arithmetic on them too loosely for anything narrower
Array = Any

#: gate, up and down of one expert.
Glu = tuple[Array, Array, Array]

#: DeepSeek-V3's router: a sigmoid per expert instead of one softmax over all.
SIGMOID = frozenset({"glm4_moe", "dots1"})
#: routers that divide by the sum only when `norm_topk_prob` says so.
OPTIONAL_NORM = frozenset({"qwen2_moe", "qwen3_moe", "flex_olmo"}) | SIGMOID


class Block(NamedTuple):
    """The experts of one block and what chooses among them; no experts where it is dense."""

    experts: list[Glu]
    router: Array | None
    bias: Array | float = 0.0


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return config.json and every tensor in float64 of a float32 checkpoint."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: value.astype(np.float64) for name, value in load_file(file).items()}
    return config, tensors


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    """Return the tanh approximation of GELU (1606.08415)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    """Return the softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Return x scaled to unit mean square over the last axis, times weight."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def llama3_frequencies(plain: Array, rope: dict[str, Any]) -> Array:
    """Return rotary frequencies stretched as Llama 3.1 does.

    A frequency that turns less than `low_freq_factor` times within the original context is divided
    by `factor`, one that turns more than `high_freq_factor` times is kept, and between them the two
    are mixed in proportion to the turns.
    """
    turns = plain * rope["original_max_position_embeddings"] / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / rope["factor"]


def rotary(config: dict[str, Any], rotated: int, tokens: int) -> tuple[Array, float]:
    """Return the frequencies [rotated / 2] for a text of `tokens` and the factor on cos and sin."""
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    plain = 1.0 / rope["rope_theta"] ** (np.arange(0, rotated, 2) / rotated)
    match rope.get("rope_type", "default"):
        case "default":
            return plain, 1.0
        case "linear":
            return plain / rope["factor"], 1.0
        case "llama3":
            return llama3_frequencies(plain, rope), 1.0
        case "longrope":
            # 2402.13753: one stretch per frequency, one set for texts past the original context
            original = rope["original_max_position_embeddings"]
            stretch = rope["long_factor" if tokens > original else "short_factor"]
            longer = config["max_position_embeddings"] / original
            return plain / stretch, math.sqrt(1 + math.log(longer) / math.log(original))
    raise ValueError(f"the reference knows no rope of type {rope['rope_type']}")


class ReferenceMoE:
    """One float32 checkpoint of a supported host, run in float64."""

    def __init__(self, folder: Path) -> None:
        self.config, self.tensors = read_folder(folder)
        self.kind = self.config["model_type"]

    def logits(self, ids: list[int]) -> Array:
        """Return [T, vocabulary] for one sequence."""
        c, t = self.config, self.tensors
        x = t["model.embed_tokens.weight"][ids] * c.get("embedding_multiplier", 1.0)
        for layer in range(c["num_hidden_layers"]):
            x = self._block(layer, x)
        x = rms_norm(x, t["model.norm.weight"], c["rms_norm_eps"])
        assert c["tie_word_embeddings"] is ("lm_head.weight" not in t)
        head = t["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
        return (x @ head.T + t.get("lm_head.bias", 0.0)) / c.get("logits_scaling", 1.0)

    def block(self, layer: int) -> Block:
        """Return the experts of a block, its router [N, H] and its correction bias [N]."""
        name, t = f"model.layers.{layer}", self.tensors
        if self.kind.startswith("granite"):
            return self._fused(f"{name}.block_sparse_moe")
        place, parts, suffix = f"{name}.mlp", ("gate", "up", "down"), "_proj"
        if self.kind == "mixtral":
            place, parts, suffix = f"{name}.block_sparse_moe", ("w1", "w3", "w2"), ""
        router = t.get(f"{place}.gate.weight")
        if router is None:
            return Block([], None)
        experts = []
        for e in range(len(router)):
            gate, up, down = (t[f"{place}.experts.{e}.{p}{suffix}.weight"] for p in parts)
            experts.append((gate, up, down))
        held = "moe_statics" if self.kind == "ernie4_5_moe" else "gate"
        bias = t.get(f"{place}.{held}.e_score_correction_bias", np.zeros(len(router)))
        return Block(experts, router, bias.reshape(-1))

    def weights(self, layer: int, x: Array) -> Array:
        """Return what each expert's output is multiplied by [T, N]: 0 for experts not chosen."""
        c = self.config
        block = self.block(layer)
        assert block.router is not None
        logits = x @ block.router.T
        scores = sigmoid(logits) if self.kind in SIGMOID else softmax(logits)
        k = c["moe_k"] if self.kind == "ernie4_5_moe" else c["num_experts_per_tok"]
        # the bias takes part in the choice and not in the weight (2408.15664)
        chosen = np.argsort(-(scores + block.bias), axis=-1, kind="stable")[:, :k]
        kept = np.zeros_like(scores)
        np.put_along_axis(kept, chosen, np.take_along_axis(scores, chosen, -1), -1)
        if self.kind not in OPTIONAL_NORM or c["norm_topk_prob"]:
            kept /= kept.sum(axis=-1, keepdims=True)
        if self.kind in SIGMOID:
            assert c["n_group"] == c["topk_group"] == 1
            kept *= c["routed_scaling_factor"]
        return kept

    def _block(self, layer: int, x: Array) -> Array:
        name = f"model.layers.{layer}"
        if self.kind == "flex_olmo":
            x = x + self._norm(f"{name}.post_attention_layernorm", self._attention(layer, x))
            return x + self._norm(f"{name}.post_feedforward_layernorm", self._ffn(layer, x))
        residual = self.config.get("residual_multiplier", 1.0)
        h = self._norm(f"{name}.input_layernorm", x)
        x = x + residual * self._attention(layer, h)
        return x + residual * self._ffn(layer, self._norm(f"{name}.post_attention_layernorm", x))

    def _norm(self, name: str, x: Array) -> Array:
        return rms_norm(x, self.tensors[f"{name}.weight"], self.config["rms_norm_eps"])

    def _linear(self, name: str, x: Array) -> Array:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def _attention(self, layer: int, x: Array) -> Array:
        """Return attention with causal or sliding-window masks; query heads share key heads."""
        c, name = self.config, f"model.layers.{layer}.self_attn"
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        d = c.get("head_dim") or c["hidden_size"] // heads
        q = self._rotate(self._heads(name, "q", x, heads, d))
        k = self._rotate(self._heads(name, "k", x, kv, d)).repeat(heads // kv, axis=1)
        v = self._linear(f"{name}.v_proj", x).reshape(len(x), kv, d).repeat(heads // kv, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * c.get("attention_multiplier", d**-0.5)
        scores[:, ~self._visible(layer, len(x))] = -np.inf
        out = np.einsum("hqk,khd->qhd", softmax(scores), v)
        return self._linear(f"{name}.o_proj", out.reshape(len(x), heads * d))

    def _heads(self, name: str, part: str, x: Array, heads: int, d: int) -> Array:
        """Return queries or keys [T, heads, D], normalised as the checkpoint says."""
        out, norm = self._linear(f"{name}.{part}_proj", x), f"{name}.{part}_norm"
        if self.kind == "flex_olmo":
            # over all heads at once, before they are cut apart
            return self._norm(norm, out).reshape(len(x), heads, d)
        out = out.reshape(len(x), heads, d)
        return self._norm(norm, out) if f"{norm}.weight" in self.tensors else out

    def _visible(self, layer: int, tokens: int) -> Array:
        """Return which key positions each query position sees [T, T]."""
        c = self.config
        distance = np.arange(tokens)[:, None] - np.arange(tokens)
        visible = distance >= 0
        window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
        kinds = c.get("layer_types")
        slides = self.kind in {"mixtral", "qwen3_moe"} or (
            kinds is not None and kinds[layer] == "sliding_attention"
        )
        return visible & (distance < window) if window and slides else visible

    def _rotate(self, x: Array) -> Array:
        """Return [T, heads, D] with pairs of elements turned by the position.

        Pairs are elements i and i + R/2 of the first R; in ernie4_5_moe neighbours 2i and 2i + 1.
        """
        rotated = x.shape[-1]
        if self.kind == "glm4_moe":
            part = self.config["rope_parameters"]["partial_rotary_factor"]
            assert self.config.get("partial_rotary_factor", part) == part
            rotated = int(rotated * part)
        frequencies, factor = rotary(self.config, rotated, len(x))
        angle = np.arange(len(x))[:, None, None] * frequencies
        cos, sin = factor * np.cos(angle), factor * np.sin(angle)
        out = x.copy()
        first, second = slice(0, rotated // 2), slice(rotated // 2, rotated)
        if self.kind == "ernie4_5_moe":
            first, second = slice(0, rotated, 2), slice(1, rotated, 2)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def _ffn(self, layer: int, x: Array) -> Array:
        name = f"model.layers.{layer}"
        block = self.block(layer)
        if block.router is None:
            return self._named_glu(f"{name}.mlp", x)
        weights = self.weights(layer, x)
        out = self._shared(name, x)
        for e, (gate, up, down) in enumerate(block.experts):
            out = out + weights[:, e, None] * self._glu(x, gate, up, down)
        return out

    def _fused(self, place: str) -> Block:
        """Return the experts of GraniteMoE: gate above up in one tensor, one tensor for all."""
        t = self.tensors
        fused, down = t[f"{place}.input_linear.weight"], t[f"{place}.output_linear.weight"]
        m = fused.shape[1] // 2
        experts = [(f[:m], f[m:], d) for f, d in zip(fused, down, strict=True)]
        return Block(experts, t[f"{place}.router.layer.weight"])

    def _shared(self, name: str, x: Array) -> Array:
        t = self.tensors
        if self.kind == "qwen2_moe":
            gate = self._linear(f"{name}.mlp.shared_expert_gate", x)
            return sigmoid(gate) * self._named_glu(f"{name}.mlp.shared_expert", x)
        if f"{name}.mlp.shared_experts.up_proj.weight" in t:
            return self._named_glu(f"{name}.mlp.shared_experts", x)
        if f"{name}.shared_mlp.input_linear.weight" in t:
            gate, up = np.split(t[f"{name}.shared_mlp.input_linear.weight"], 2)
            return self._glu(x, gate, up, t[f"{name}.shared_mlp.output_linear.weight"])
        return np.zeros_like(x)

    def _named_glu(self, name: str, x: Array) -> Array:
        hidden = self._act(self._linear(f"{name}.gate_proj", x))
        return self._linear(f"{name}.down_proj", hidden * self._linear(f"{name}.up_proj", x))

    def _glu(self, x: Array, gate: Array, up: Array, down: Array) -> Array:
        return (self._act(x @ gate.T) * (x @ up.T)) @ down.T

    def _act(self, x: Array) -> Array:
        act = self.config["hidden_act"]
        if act not in {"silu", "gelu_pytorch_tanh"}:
            raise ValueError(f"the reference knows no activation {act}")
        return x * sigmoid(x) if act == "silu" else gelu_tanh(x)
