"""What the layout of a host says, followed literally: dense weights in, stock checkpoint out.

The interpreter below is the smallest thing that can follow a layout; it shares nothing with
`planning`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaconvert.arch import registry
from adaconvert.arch.base import Carry, HostLayout, HostRequest, HostTensor, ModelSpec
from adaconvert.arch.host import HOSTS

EXPERTS, TOP_K, LENGTH, NEW_TOKENS = 4, 2, 40, 12

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """A tiny dense checkpoint: what it is, what it holds, what it computes."""

    spec: ModelSpec
    tensors: Tensors
    logits: torch.Tensor
    tokens: torch.Tensor


def probe(vocab: int, length: int = LENGTH) -> torch.Tensor:
    """Return two sequences of token ids, [2, length], always the same."""
    return torch.randint(3, vocab, (2, length), generator=torch.Generator().manual_seed(7))


def compute(model: Any, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of two probe sequences and the greedy continuation of the first."""
    ids = probe(model.config.vocab_size, length)
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(
            ids[:1],
            attention_mask=torch.ones_like(ids[:1]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return logits, tokens


def open_source(folder: Path) -> Source:
    """Return what a dense checkpoint in float32 holds and computes."""
    config = json.loads((folder / "config.json").read_text())
    logits, tokens = compute(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    tensors = load_file(folder / "model.safetensors")
    return Source(spec=registry.describe(config), tensors=tensors, logits=logits, tokens=tokens)


def interleave(weight: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """Return a projection with the two halves of every head interleaved."""
    halves = weight.reshape(heads, 2, head_dim // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


FUNCTIONS: dict[str, Any] = {
    "plus_one": lambda w: w + 1,
    "scale": lambda w, factor: w * factor,
    "center_rows": lambda w: w - w.mean(dim=1, keepdim=True),
    "center_out": lambda w: w - w.mean(dim=0, keepdim=True),
    "interleave_rope": interleave,
}


def follow(carry: Carry, shape: tuple[int, ...], tensors: Tensors) -> torch.Tensor:
    """Return what a carried tensor of a layout is."""
    params = dict(carry.params)
    if carry.tensor is None:
        assert carry.fn == "constant"
        return torch.full(shape, float(params["value"]))
    weight = tensors[carry.tensor]
    if carry.rows is not None:
        start, count = carry.rows
        weight = weight[start : start + count]
    return FUNCTIONS[carry.fn](weight, **params) if carry.fn else weight.clone()


@dataclass(frozen=True)
class Neurons:
    """Gate and up rows [n, H] and down columns [H, n] of some neurons of a dense FFN."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def cut(self, start: int, count: int) -> Neurons:
        """Return some of them."""
        part = slice(start, start + count)
        return Neurons(self.gate[part], self.up[part], self.down[:, part])


def neurons(source: Source, layout: HostLayout, layer: int) -> Neurons:
    """Return the neurons of a dense feed-forward network."""
    found = {}
    for name, rows in source.spec.ffn_rows(layer).items():
        found[name] = source.tensors[rows.tensor][rows.start : rows.start + rows.count]
    if layout.down_fn:
        found["down"] = FUNCTIONS[layout.down_fn](found["down"])
    return Neurons(**found)


def fill(
    source: Source, layout: HostLayout, request: HostRequest, tensor: HostTensor
) -> torch.Tensor:
    """Return an expert, shared or router tensor of an exact upcycling with identical experts."""
    assert tensor.layer is not None
    if tensor.role == "router":
        seed = torch.Generator().manual_seed(100 + tensor.layer)
        return 0.5 * torch.randn(tensor.shape, generator=seed)
    if tensor.role == "shared_router":
        return torch.zeros(tensor.shape)
    dense = neurons(source, layout, tensor.layer)
    split = request.shared_kind == "split"
    shared = dense.cut(0, request.shared_width)
    routed = dense.cut(request.shared_width if split else 0, request.expert_width)
    # a shared expert behind a sigmoid of zero counts half
    factor = (2.0 if layout.shared_gated else 1.0) if split else 0.0
    values = {
        "expert_gate": lambda: routed.gate,
        "expert_up": lambda: routed.up,
        "expert_down": lambda: routed.down,
        "expert_gate_up": lambda: torch.cat([routed.gate, routed.up]).expand(tensor.shape),
        "expert_downs": lambda: routed.down.expand(tensor.shape),
        "shared_gate": lambda: shared.gate,
        "shared_up": lambda: shared.up,
        "shared_gate_up": lambda: torch.cat([shared.gate, shared.up]),
        "shared_down": lambda: factor * shared.down,
    }
    return values[tensor.role]().clone()


def materialise(source: Source, layout: HostLayout, request: HostRequest, folder: Path) -> None:
    """Write the checkpoint a layout describes, with identical experts."""
    tensors = {}
    for tensor in layout.tensors:
        value = (
            follow(tensor.carry, tensor.shape, source.tensors)
            if tensor.carry is not None
            else fill(source, layout, request, tensor)
        )
        assert tuple(value.shape) == tensor.shape, tensor
        tensors[tensor.name] = value.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(layout.config))


def ask(spec: ModelSpec, **changes: Any) -> HostRequest:
    """Return a request for 4 experts as wide as the dense network, 2 a token, in every block."""
    values: dict[str, Any] = {
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "expert_width": spec.intermediate,
        "moe_layers": frozenset(range(spec.layers)),
        **changes,
    }
    return HostRequest(**values)


def load(folder: Path) -> Any:
    """Return the model in a folder, which has every tensor and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def difference(source: Source, host: str, request: HostRequest, folder: Path) -> tuple[float, bool]:
    """Return max |dlogit| / max |logit| and whether the greedy continuation is the same."""
    assert HOSTS[host].reasons(source.spec, request) == []
    layout = HOSTS[host].layout(source.spec, request, "float32")
    materialise(source, layout, request, folder)
    logits, tokens = compute(load(folder))
    worst = (logits - source.logits).abs().max() / source.logits.abs().max()
    return float(worst), torch.equal(tokens, source.tokens)
