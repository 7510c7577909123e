"""Checkpoints with null experts made by hand from tiny mixtures, for tests that need no method.

It shares no code with the converter. Null rows are copies of the router's or zero, so the result
computes what the mixture does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.modeling.loading import CODE_FILES, code_folder

if TYPE_CHECKING:
    import torch

#: family -> path of a sparse block in memory, its path on disk, the router in it, its weight on
#: disk, the key of the expert width, whether logits are float32.
_BLOCKS: dict[str, tuple[str, str, str, str, bool]] = {
    "mixtral": (
        *("mlp", "block_sparse_moe", "gate", "intermediate_size"),
        False,
    ),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe"), ("mlp", "mlp", "gate", "moe_intermediate_size", False)
    ),
    "olmoe": ("mlp", "mlp", "gate", "intermediate_size", False),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared"),
        ("block_sparse_moe", "block_sparse_moe", "router", "intermediate_size", False),
    ),
    "deepseek_v2": ("mlp", "mlp", "gate", "moe_intermediate_size", True),
}
_RENORMALISES = ("mixtral", "granitemoe", "granitemoeshared")
Tensors = dict[str, "torch.Tensor"]


def make_nulled(
    stock: Path,
    folder: Path,
    *,
    count: int | None = None,
    slots: int | None = None,
    init: str = "exact",
    kind: str = "zero",
    weights: str = "real",
    min_real: int = 0,
    select: Mapping[str, Any] | None = None,
    edit: Callable[[Tensors], None] | None = None,
) -> Path:
    """Return `folder`, now a copy of a mixture with null experts that computes the same.

    Args:
        stock: checkpoint of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, GraniteMoE or DeepSeek-V2.
        folder: where to; must not exist.
        count: null experts M; as many as real ones when not given.
        slots: K'; what makes the start exact when not given.
        init: "exact" (copies of the router's rows) or "bias" (zero rows, bias -10000).
        kind: "zero", "identity" or "constant".
        weights: "real" or "selected".
        min_real: real experts every token runs, 0 or 1.
        select: of every site, {"rule": "null"} when not given.
        edit: changes the tensors before they are written.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((stock / "config.json").read_text())
    tensors: Tensors = {}
    for file in sorted(stock.glob("*.safetensors")):
        tensors |= load_file(file)
    sites: dict[str, Any] = {}
    for layer in range(config["num_hidden_layers"]):
        found = _site(config, tensors, layer)
        if found is None:
            continue
        path, stored, rows, spec = found
        experts, top_k = spec["experts"]["count"], spec["mixture"]["top_k"]
        null = experts if count is None else count
        exact = init == "exact"
        spec["null"] = {
            "count": null,
            "slots": slots or (top_k * (experts + null) // experts if exact else top_k),
            "kind": kind,
            "weights": weights,
            "gain": 1 + null / experts if weights == "selected" and exact else 1.0,
            "min_real": min_real,
            "target": None,
        }
        spec["select"] = dict(select or {"rule": "null"})
        sites[path] = {"ffn": spec}
        tensors |= _null_tensors(f"{stored}.null_experts", rows, null, kind, exact=exact)
    if edit is not None:
        edit(tensors)
    shutil.copytree(stock, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config |= _adaptive(config, sites)
    (folder / "config.json").write_text(json.dumps(config))
    for name in CODE_FILES:
        shutil.copy(code_folder() / name, folder / name)
    return folder


def _site(
    config: Mapping[str, Any], tensors: Tensors, layer: int
) -> tuple[str, str, torch.Tensor, dict[str, Any]] | None:
    """Return path, stored path, router rows and description of a block; None of a dense one."""
    family = config["model_type"]
    inside, stored, router, width, wide = _BLOCKS[family]
    base = f"model.layers.{layer}"
    names = (f"{base}.{stored}.{router}.weight", f"{base}.{stored}.{router}.layer.weight")
    rows = next((tensors[name] for name in names if name in tensors), None)
    if rows is None:
        return None
    experts, hidden = rows.shape
    renorm = family in _RENORMALISES or bool(config.get("norm_topk_prob"))
    if family == "deepseek_v2":
        renorm = False
    spec: dict[str, Any] = {
        "mixture": {
            "router": router,
            "experts": "experts",
            "top_k": config["num_experts_per_tok"],
            "combine": "renorm" if renorm else "all",
            "scaling": float(config.get("routed_scaling_factor") or 1.0),
            "float32": wide,
            "glu": True,
        },
        "weights": {},
        "activation": config["hidden_act"],
        "hidden": hidden,
        "intermediate": experts * config[width],
        "partition": {"split": "mixture", "permuted": False},
        "experts": {"count": experts, "width": config[width]},
        "shared": 0,
        "router": {"kind": "mixture"},
        "combine": "unit",
    }
    return f"{base}.{inside}", f"{base}.{stored}", rows, spec


def _null_tensors(name: str, rows: torch.Tensor, count: int, kind: str, *, exact: bool) -> Tensors:
    import torch

    experts, hidden = rows.shape
    if exact:
        assert count % experts == 0, "copies are whole sets of rows"
        weight = rows.repeat(count // experts, 1)
    else:
        weight = rows.new_zeros(count, hidden)
    made = {
        f"{name}.weight": weight,
        f"{name}.bias": torch.full((1,), 0.0 if exact else -1e4, dtype=torch.float32),
    }
    if kind == "identity":
        made[f"{name}.scale"] = torch.zeros(1)
    if kind == "constant":
        made[f"{name}.value"] = torch.zeros(count, hidden)
    return made


def _adaptive(config: Mapping[str, Any], sites: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config values that make a checkpoint of the sites adaptive."""
    import transformers

    family, (architecture,) = config["model_type"], config["architectures"]
    stock: Any = getattr(transformers, architecture)
    flops = 0
    for slots in sites.values():
        spec = slots["ffn"]
        neurons = spec["mixture"]["top_k"] * spec["experts"]["width"]
        flops += 2 * spec["hidden"] * (3 * neurons + spec["experts"]["count"])
    adaptive = {
        "version": 1,
        "base": {
            "architecture": architecture,
            "config": stock.config_class.__name__,
            "model_type": family,
        },
        "reference": {
            "flops_per_token": flops + 20000,
            "ffn_flops_per_token": flops,
            "length": 512,
        },
        "sites": dict(sites),
        "model": {"exits": None, "recursion": None, "decode_policy": None},
        "calibration": None,
    }
    return {
        "adaptive": adaptive,
        "model_type": f"adaptive_{family}",
        "architectures": [f"Adaptive{architecture}"],
        "auto_map": {
            "AutoConfig": f"configuration_adaptive.Adaptive{stock.config_class.__name__}",
            "AutoModelForCausalLM": f"modeling_adaptive.Adaptive{architecture}",
        },
    }
