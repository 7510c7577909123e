"""Checkpoints with exits made by hand from dense ones, for tests of the runtime alone.

Heads begin as copies, so that an exit computes what the model cut off there would.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaconvert.modeling.loading import CODE_FILES, code_folder

_LLAMA = ("model.layers", {"norm": "model.norm", "head": "lm_head"}, "mlp")
#: family -> path of the blocks, tail, name of the network in a block.
PLACES: dict[str, tuple[str, dict[str, str], str | None]] = {
    **dict.fromkeys(
        [
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo"),
            *("olmo2", "olmo3", "granite", "smollm3", "phi3", "mixtral"),
        ],
        _LLAMA,
    ),
    "gpt2": ("transformer.h", {"norm": "transformer.ln_f", "head": "lm_head"}, "mlp"),
    "gpt_neox": (
        "gpt_neox.layers",
        {"norm": "gpt_neox.final_layer_norm", "head": "lm_head"},
        "mlp",
    ),
    "bert": ("bert.encoder.layer", {"pooler": "bert.pooler", "head": "classifier"}, None),
    "vit": ("vit.layers", {"norm": "vit.layernorm", "head": "classifier"}, "mlp"),
}
#: kind of head -> (own norm and pooler, map, network, block).
KINDS = {
    "shared": (False, False, False, False),
    "affine": (False, True, False, False),
    "norm": (True, False, False, False),
    "mlp": (True, False, True, False),
    "layer": (True, False, False, True),
    "full": (True, False, True, True),
}


def exits_of(
    family: str,
    places: Sequence[int],
    kind: str = "norm",
    *,
    tie: bool = False,
    confidence: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Return `config.adaptive.model.exits`.

    Args:
        family: a key of `PLACES`.
        places: blocks before each exit.
        kind: a key of `KINDS`.
        tie: no exit has an output matrix of its own.
        confidence: every exit has a classifier of confidence, of random numbers.
        more: keys of it to replace.
    """
    blocks, tail, network = PLACES[family]
    own, affine, branch, block = KINDS[kind]
    roles = [role for role in tail if own and not (tie and role == "head")]
    heads = [
        {
            "at": place,
            "own": roles,
            "map": affine,
            "network": branch,
            "block": block,
            "confidence": confidence,
        }
        for place in places
    ]
    decide = {
        "measure": "max",
        "thresholds": [None] * len(heads),
        "decay": None,
        "patience": None,
    }
    made = {
        "kind": "classifier" if "pooler" in tail or family == "vit" else "causal",
        "blocks": blocks,
        "tail": tail,
        "network": network if branch else None,
        "scale": 1.0,
        "heads": heads,
        "decide": decide,
        "kv": "recompute",
        "draft": None,
    }
    return {**made, **more}


def by_hand(
    dense: Path, folder: Path, places: Sequence[int], kind: str = "norm", **options: Any
) -> Path:
    """Write the checkpoint of a dense one with exits; return `folder`.

    Args:
        dense: checkpoint of a family in `PLACES`, one file of weights.
        folder: to write.
        places, kind, options: see `exits_of`.
    """
    import transformers
    from safetensors.torch import load_file, save_file

    from adaconvert.modeling import modeling_adaptive

    config = json.loads((dense / "config.json").read_text())
    family, architecture = config["model_type"], config["architectures"][0]
    options.setdefault("scale", float(config.get("residual_multiplier", 1.0)))
    exits = exits_of(family, places, kind, **options)
    stock: Any = getattr(transformers, architecture)
    base = {
        "architecture": architecture,
        "config": stock.config_class.__name__,
        "model_type": family,
    }
    config["adaptive"] = {
        "version": 1,
        "base": base,
        "reference": {"flops_per_token": 10**6, "ffn_flops_per_token": 0, "length": 512},
        "sites": {},
        "model": {"exits": exits, "recursion": None, "decode_policy": None},
        "calibration": None,
    }
    config["model_type"] = f"adaptive_{family}"
    config["architectures"] = [f"Adaptive{architecture}"]
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    made: Any = getattr(modeling_adaptive, f"Adaptive{architecture}")
    model = made(made.config_class(**config))
    tensors = load_file(next(dense.glob("*.safetensors")))
    source = stock.from_pretrained(dense, dtype=next(iter(tensors.values())).dtype)
    for head in model.get_submodule("exits").values():
        _copied(source, exits, head, tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in CODE_FILES:
        shutil.copy(code_folder() / name, folder / name)
    return folder


def _copied(source: Any, exits: Mapping[str, Any], head: Any, tensors: dict[str, Any]) -> None:
    """Add the tensors of an exit: copies of the model's own, the identity for a map."""
    import torch

    blocks = source.get_submodule(exits["blocks"])
    origins = {role: source.get_submodule(exits["tail"][role]) for role in head.roles}
    if "network" in head._modules:
        origins["network"] = getattr(blocks[head.at - 1], exits["network"])
    if "block" in head._modules:
        origins["block"] = blocks[-1]
    dtype = next(iter(tensors.values())).dtype
    for name, origin in origins.items():
        for key, value in origin.state_dict().items():
            tensors[f"exits.{head.at}.{name}.{key}"] = value.clone()
    if "draft_tokens" in head._buffers:
        tensors[f"exits.{head.at}.draft_tokens"] = torch.arange(len(head.draft_tokens))
    if "map" in head._modules:
        size = head.map.in_features
        tensors[f"exits.{head.at}.map.weight"] = torch.eye(size, dtype=dtype)
        tensors[f"exits.{head.at}.map.bias"] = torch.zeros(size, dtype=dtype)
    if "confidence" in head._modules:
        shape, generator = head.confidence.weight.shape, torch.Generator().manual_seed(head.at)
        weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        tensors[f"exits.{head.at}.confidence.weight"] = weight.to(dtype)
        tensors[f"exits.{head.at}.confidence.bias"] = torch.zeros(1, dtype=dtype)
