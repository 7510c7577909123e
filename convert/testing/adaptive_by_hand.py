"""Adaptive checkpoints made by hand from dense ones, for tests of the runtime alone.

The neurons stay where they are, so the result is the dense model to the last bit with every expert
on; router tensors are random.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaconvert.modeling.loading import CODE_FILES, code_folder

_GLU = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_FUSED = {"gate_up": "gate_up_proj", "down": "down_proj"}
#: family -> path of a block's feed-forward module, and its children by role.
SITES: dict[str, tuple[str, dict[str, str]]] = {
    **dict.fromkeys(
        [
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo"),
            *("olmo2", "olmo3", "granite", "smollm3"),
        ],
        ("model.layers.{}.mlp", _GLU),
    ),
    "phi3": ("model.layers.{}.mlp", _FUSED),
    "gpt2": ("transformer.h.{}.mlp", {"up": "c_fc", "down": "c_proj"}),
    "gpt_neox": ("gpt_neox.layers.{}.mlp", {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}),
    "bert": ("bert.encoder.layer.{}.intermediate", {"up": "dense"}),
}
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next(config[name] for name in names if config.get(name) is not None)


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    hidden = int(_first(config, "hidden_size", "n_embd"))
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    return hidden, int(inner), int(_first(config, "num_hidden_layers", "n_layer"))


def _activation(config: Mapping[str, Any]) -> str:
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((str(config[name]) for name in names if config.get(name)), "silu")


def _router_tensors(
    kind: str, hidden: int, experts: int, gated: bool
) -> dict[str, tuple[int, ...]]:
    if kind in {"param-center", "similarity"}:
        return {"weight": (experts, hidden)}
    if kind == "contribution":
        return {"w1": (16, hidden), "w2": (experts, 16)}
    if kind == "analytic":
        gate = {"gate": (experts, hidden)} if gated else {}
        return {**gate, "up": (experts, hidden), "bias": (experts,)}
    return {}


def make_adaptive(
    dense: Path,
    folder: Path,
    *,
    router: str = "param-center",
    experts: int = 8,
    shared: int = 0,
    select: Mapping[str, Any] | None = None,
) -> Path:
    """Return `folder`, now an adaptive copy of a dense checkpoint with random routers.

    Args:
        dense: checkpoint of a family in `SITES`.
        folder: where to; must not exist.
        router: kind, as in `config.adaptive`.
        experts: routed experts per block.
        shared: always-on neurons.
        select: selection of every site; all experts when not given.
    """
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    config = json.loads((dense / "config.json").read_text())
    family, architecture = config["model_type"], config["architectures"][0]
    template, weights = SITES[family]
    hidden, inner, layers = _sizes(config)
    gated = "gate" in weights or "gate_up" in weights
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(dense.glob("*.safetensors")):
        tensors |= load_file(file)
    generator = torch.Generator().manual_seed(1)
    sites: dict[str, Any] = {}
    for layer in range(layers):
        path = template.format(layer)
        spec: dict[str, Any] = {
            "weights": weights,
            "activation": _activation(config),
            "hidden": hidden,
            "intermediate": inner,
            "partition": {"split": "contiguous"},
            "experts": {"count": experts, "width": (inner - shared) // experts},
            "shared": shared,
            "router": {"kind": router, **({"width": 16} if router == "contribution" else {})},
            "select": dict(select or {"rule": "all"}),
            "combine": "unit",
            "null": None,
        }
        if "down" not in weights:
            spec["down_path"] = f"bert.encoder.layer.{layer}.output.dense"
        sites[path] = {"ffn": spec}
        tensors[f"{path}.neuron_order"] = torch.arange(inner, dtype=torch.int32)
        for name, shape in _router_tensors(router, hidden, experts, gated).items():
            tensors[f"{path}.router.{name}"] = torch.randn(shape, generator=generator)
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stock: Any = getattr(transformers, architecture)
    ffn = layers * 2 * hidden * inner * (3 if gated else 2)
    config["adaptive"] = {
        "version": 1,
        "base": {
            "architecture": architecture,
            "config": stock.config_class.__name__,
            "model_type": family,
        },
        "reference": {
            "flops_per_token": ffn + 20000,
            "ffn_flops_per_token": ffn,
            "length": 512,
        },
        "sites": sites,
        "model": {"exits": None, "recursion": None, "decode_policy": None},
        "calibration": None,
    }
    auto = next(value for end, value in _AUTO.items() if architecture.endswith(end))
    config["model_type"] = f"adaptive_{family}"
    config["architectures"] = [f"Adaptive{architecture}"]
    config["auto_map"] = {
        "AutoConfig": f"configuration_adaptive.Adaptive{stock.config_class.__name__}",
        auto: f"modeling_adaptive.Adaptive{architecture}",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in CODE_FILES:
        shutil.copy(code_folder() / name, folder / name)
    return folder
