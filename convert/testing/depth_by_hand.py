"""Checkpoints with routed blocks made by hand from dense ones, for tests of the runtime alone.

Routers and adapters are random unless asked for as they start, so that some tokens skip.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaconvert.modeling.loading import CODE_FILES, code_folder
from adaconvert.testing.exits_by_hand import PLACES

_SEPARATE = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
#: family -> matrices behind queries, keys and values, where they are others.
_KEYS = {
    "gpt2": ["attn.c_attn"],
    "gpt_neox": ["attention.query_key_value"],
    "phi3": ["self_attn.qkv_proj"],
}
#: causal families that tokens can skip blocks of.
FAMILIES = tuple(family for family in PLACES if family not in ("bert", "vit"))


def layer_of(family: str, index: int, hidden: int, kind: str, **more: Any) -> dict[str, Any]:
    """Return the "layer" slot of a block.

    Args:
        family: one of `FAMILIES`.
        index: of the block.
        hidden: d.
        kind: "skip", "mod", or "skip-kv" for "skip" without keys and values.
        more: keys of it to replace.
    """
    keeps = kind == "skip"
    is_mod = kind == "mod"
    made = {
        "kind": "mod" if is_mod else "skip",
        "index": index,
        "hidden": hidden,
        "router": {"width": None},
        "predictor": {"width": 8} if is_mod else None,
        "gate": 0.2 if is_mod else 0.0,
        "adapter": None if is_mod else {"width": 4},
        "kv": "keep" if keeps else "skip",
        "keys": _KEYS.get(family, _SEPARATE) if keeps else [],
        "capacity": 0.5 if is_mod else None,
        "select": {"rule": "threshold", "threshold": 0.0},
    }
    return {**made, **more}


def depth_by_hand(
    dense: Path,
    folder: Path,
    blocks: Sequence[int],
    kind: str = "skip",
    *,
    start: bool = False,
    seed: int = 0,
    **more: Any,
) -> Path:
    """Write the checkpoint of a dense one whose tokens may skip blocks; return `folder`.

    Args:
        dense: checkpoint of one of `FAMILIES`, one file of weights.
        folder: to write.
        blocks: that are routed.
        kind, more: see `layer_of`.
        start: parts as a conversion begins, every block open, instead of random ones.
        seed: of these.
    """
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from adaconvert.modeling import modeling_adaptive

    config = json.loads((dense / "config.json").read_text())
    family, architecture = config["model_type"], config["architectures"][0]
    stock: Any = getattr(transformers, architecture)
    hidden = int(stock.config_class(**config).hidden_size)
    path = PLACES[family][0]
    config["adaptive"] = {
        "version": 1,
        "base": {
            "architecture": architecture,
            "config": stock.config_class.__name__,
            "model_type": family,
        },
        "reference": {"flops_per_token": 10**6, "ffn_flops_per_token": 0, "length": 16},
        "sites": {
            f"{path}.{index}": {"layer": layer_of(family, index, hidden, kind, **more)}
            for index in blocks
        },
        "model": {"exits": None, "recursion": None, "decode_policy": None},
        "calibration": None,
    }
    config["model_type"] = f"adaptive_{family}"
    config["architectures"] = [f"Adaptive{architecture}"]
    config["auto_map"] = {
        "AutoConfig": f"configuration_adaptive.Adaptive{stock.config_class.__name__}",
        "AutoModelForCausalLM": f"modeling_adaptive.Adaptive{architecture}",
    }
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    made: Any = getattr(modeling_adaptive, f"Adaptive{architecture}")
    model = made(made.config_class(**config))
    tensors = load_file(next(dense.glob("*.safetensors")))
    dtype = next(iter(tensors.values())).dtype
    # of "mod" two networks decide together: a draw by which some tokens run and some do not
    rng = torch.Generator().manual_seed(seed + int(kind == "mod"))
    for name, value in model.state_dict().items():
        if ".depth." not in name:
            continue
        found = value
        if not start:
            found = torch.randn(value.shape, generator=rng) * (0.1 if "bias" in name else 0.5)
        tensors[name] = found.to(torch.float32 if ".router." in name else dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in CODE_FILES:
        shutil.copy(code_folder() / name, folder / name)
    return folder
