"""A mixture-of-experts decoder written from the papers in plain numpy, to hold converted
checkpoints against.

It shares no code with transformers or with the converter: it reads the on-disk names itself, works
in float64, and computes every expert on its own. Identical experts hide routing mistakes; this is
what distinct experts are compared with. It covers the Llama-like hosts: mixtral, qwen2_moe,
granitemoe and granitemoeshared.

Shapes: T tokens of one sequence, H hidden size, D head size, N experts, k experts per token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# float64 arrays; numpy types arithmetic on them too loosely for anything narrower
Array = Any


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return config.json and every tensor in float64 of a float32 checkpoint."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: value.astype(np.float64) for name, value in load_file(file).items()}
    return config, tensors


def silu(x: Array) -> Array:
    """Return x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    """Return the softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Return x scaled to unit mean square, times weight."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


class ReferenceMoE:
    """One float32 checkpoint of a supported host, run in float64."""

    def __init__(self, folder: Path) -> None:
        self.config, self.tensors = read_folder(folder)
        self.kind = self.config["model_type"]

    def logits(self, ids: list[int]) -> Array:
        """Return [T, vocabulary] for one sequence."""
        c = self.config
        x = self.tensors["model.embed_tokens.weight"][ids] * c.get("embedding_multiplier", 1.0)
        residual = c.get("residual_multiplier", 1.0)
        for layer in range(c["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + residual * self._attention(name, self._norm(name, "input_layernorm", x))
            h = self._norm(name, "post_attention_layernorm", x)
            x = x + residual * self._ffn(name, h)
        x = rms_norm(x, self.tensors["model.norm.weight"], c["rms_norm_eps"])
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return x @ head.T / c.get("logits_scaling", 1.0)

    def _norm(self, name: str, which: str, x: Array) -> Array:
        return rms_norm(x, self.tensors[f"{name}.{which}.weight"], self.config["rms_norm_eps"])

    def _linear(self, name: str, x: Array) -> Array:
        out = x @ self.tensors[f"{name}.weight"].T
        return out + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else out

    def _attention(self, name: str, x: Array) -> Array:
        c = self.config
        heads, kv, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        count = len(x)
        q = self._rope(self._linear(f"{name}.self_attn.q_proj", x).reshape(count, heads, d))
        k = self._rope(self._linear(f"{name}.self_attn.k_proj", x).reshape(count, kv, d))
        v = self._linear(f"{name}.self_attn.v_proj", x).reshape(count, kv, d)
        scale = c.get("attention_multiplier", d**-0.5)
        hidden = np.triu(np.ones((count, count), dtype=bool), 1)
        window = c.get("sliding_window")
        if window:
            hidden |= np.tril(np.ones((count, count), dtype=bool), -window)
        out = np.empty((count, heads, d))
        for head in range(heads):
            scores = q[:, head] @ k[:, head * kv // heads].T * scale
            scores[hidden] = -np.inf
            out[:, head] = softmax(scores) @ v[:, head * kv // heads]
        return self._linear(f"{name}.self_attn.o_proj", out.reshape(count, heads * d))

    def _rope(self, x: Array) -> Array:
        d = x.shape[-1]
        angle = np.arange(len(x))[:, None] / self.config["rope_theta"] ** (np.arange(0, d, 2) / d)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def _ffn(self, name: str, x: Array) -> Array:
        experts, router = self._experts(name)
        if router is None:
            return self._glu(
                x, *(self.tensors[f"{name}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
            )
        k = self.config["num_experts_per_tok"]
        p = softmax(x @ router.T)
        out = np.zeros_like(x)
        for token, row in enumerate(p):
            chosen = np.argsort(-row, kind="stable")[:k]
            for e in chosen:
                out[token] += row[e] / row[chosen].sum() * self._glu(x[token], *experts[e])
        return out + self._shared(name, x)

    def _experts(self, name: str) -> tuple[list[tuple[Array, Array, Array]], Array | None]:
        t, c = self.tensors, self.config
        if self.kind == "mixtral":
            block = f"{name}.block_sparse_moe"
            triples = [
                tuple(t[f"{block}.experts.{e}.{w}.weight"] for w in ("w1", "w3", "w2"))
                for e in range(c["num_local_experts"])
            ]
            return triples, t[f"{block}.gate.weight"]
        if self.kind.startswith("granite"):
            block = f"{name}.block_sparse_moe"
            fused, down = t[f"{block}.input_linear.weight"], t[f"{block}.output_linear.weight"]
            m = fused.shape[1] // 2
            return [(f[:m], f[m:], d) for f, d in zip(fused, down, strict=True)], t[
                f"{block}.router.layer.weight"
            ]
        if f"{name}.mlp.gate.weight" not in t:
            return [], None
        triples = [
            tuple(t[f"{name}.mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down"))
            for e in range(c["num_experts"])
        ]
        assert c["norm_topk_prob"] is True
        return triples, t[f"{name}.mlp.gate.weight"]

    def _shared(self, name: str, x: Array) -> Array:
        t = self.tensors
        if self.kind == "qwen2_moe":
            parts = [t[f"{name}.mlp.shared_expert.{p}_proj.weight"] for p in ("gate", "up", "down")]
            gate = x @ t[f"{name}.mlp.shared_expert_gate.weight"].T
            return self._glu(x, *parts) / (1 + np.exp(-gate))
        if f"{name}.shared_mlp.input_linear.weight" in t:
            fused = t[f"{name}.shared_mlp.input_linear.weight"]
            s = len(fused) // 2
            return self._glu(x, fused[:s], fused[s:], t[f"{name}.shared_mlp.output_linear.weight"])
        return np.zeros_like(x)

    def _glu(self, x: Array, gate: Array, up: Array, down: Array) -> Array:
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T
