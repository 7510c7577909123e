"""Models for `bench_decode.py`: a dense one, and an adaptive one on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from adaconvert.modeling.adaptive_execution import prepare

#: neurons of an expert.
WIDTH = 32


def centers(gate: Tensor, experts: int) -> Tensor:
    """Return the mean of the normalised rows of each expert, [f, d] -> [E, d]."""
    unit = functional.normalize(gate.float(), dim=-1)
    return unit.unflatten(0, (experts, -1)).mean(dim=1)


def dense_model(folder: Path | None, dtype: torch.dtype) -> Any:
    """Return the checkpoint's model, or one of Llama-3.2-1B's dimensions with random weights."""
    if folder is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def adaptive_twin(stock: Any) -> Any:
    """Return an adaptive model on the same weights, with parameter-center routers.

    It shares the stock model's memory and keeps copies of the down matrices by rows.
    """
    from adaconvert.modeling import modeling_adaptive

    fields = stock.config.to_dict()
    for name in ("architectures", "model_type", "transformers_version"):
        fields.pop(name, None)
    made: Any = modeling_adaptive.AdaptiveLlamaForCausalLM
    config = made.config_class(**fields, adaptive=adaptive_spec(stock))
    with torch.device("meta"):
        model = made(config)
    tensors = dict(stock.state_dict())
    for path, module in stock.named_modules():
        if path.endswith(".mlp"):
            experts = module.gate_proj.weight.shape[0] // WIDTH
            tensors[f"{path}.router.weight"] = centers(module.gate_proj.weight, experts)
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = stock.model.rotary_emb
    prepare(model)
    return model.eval()


def adaptive_spec(stock: Any) -> dict[str, Any]:
    config = stock.config
    spec = {
        "weights": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
        "activation": config.hidden_act,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "partition": {"split": "contiguous", "permuted": False},
        "experts": {"count": config.intermediate_size // WIDTH, "width": WIDTH},
        "shared": 0,
        "router": {"kind": "param-center"},
        "select": {"rule": "all"},
        "combine": "unit",
        "null": None,
    }
    sites = {f"model.layers.{i}.mlp": {"ffn": spec} for i in range(config.num_hidden_layers)}
    base = {
        "architecture": "LlamaForCausalLM",
        "config": "LlamaConfig",
        "model_type": "llama",
    }
    return {
        "version": 1,
        "base": base,
        "reference": {"flops_per_token": 1, "ffn_flops_per_token": 1, "length": 512},
        "sites": sites,
        "model": {"exits": None, "recursion": None, "decode_policy": None},
        "calibration": None,
    }
