"""Adapter folders made by hand for tests, as PEFT names them; nothing of `methods` is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_NAMES = {
    "adapters.a": "molora_A",
    "adapters.b": "molora_B",
    "adapters.vectors": "molora_vectors",
    "router.weight": "molora_router",
}


def make_folder(standalone: Path, base: Path, folder: Path, **changes: object) -> Path:
    """Return `folder`, now the routed adapters of a standalone checkpoint as a PEFT folder.

    Args:
        standalone: as `adapters_by_hand.make_adapted` makes it, the same adapters everywhere.
        base: what the folder names as its base.
        folder: where to; must not exist.
        changes: keys of adapter_config.json to change.
    """
    from safetensors.torch import load_file, save_file

    sites = json.loads((standalone / "config.json").read_text())["adaptive"]["sites"]
    slots = {path: slot["linear"] for path, slot in sites.items() if slot.get("linear")}
    stored = load_file(standalone / "model.safetensors")
    tensors = {
        f"base_model.model.{path}.{theirs}": stored[f"{path}.{ours}"]
        for path in slots
        for ours, theirs in _NAMES.items()
        if f"{path}.{ours}" in stored
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {**_config(slots), "base_model_name_or_path": str(base), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _config(slots: Mapping[str, Any]) -> dict[str, Any]:
    first = next(iter(slots.values()))
    adapters, router = first["adapters"], first["router"]
    scaled = {p.rpartition(".")[2] for p, s in slots.items() if s["adapters"].get("on") == "input"}
    return {
        "peft_type": "MOLORA",
        "task_type": "CAUSAL_LM",
        "revision": None,
        "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in slots}),
        "num_experts": adapters["count"],
        "r": adapters.get("rank", 8),
        "lora_alpha": 16,
        "scaling": adapters.get("scaling"),
        "experts_kind": adapters["kind"],
        "share": adapters.get("share"),
        "feedforward_modules": sorted(scaled) or None,
        "dropout": 0.0,
        "router": {key: value for key, value in router.items() if key not in ("of", "input")},
        "select": first["select"],
        "init_std": 0.02,
        "base_fingerprint": None,
    }


def make_lora(
    base: Path, folder: Path, *, targets: Sequence[str] = ("q_proj", "v_proj"), **settings: Any
) -> Path:
    """Return `folder`, now a stock LoRA with random factors, as PEFT saves it.

    Args:
        base: a causal language model.
        folder: where to; must not exist.
        targets: linears that are adapted.
        settings: of `peft.LoraConfig`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    given = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted = get_peft_model(model, LoraConfig(target_modules=list(targets), **given))
    generator = torch.Generator().manual_seed(1)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data = (torch.randn(value.shape, generator=generator) * 0.3).to(value.dtype)
    adapted.save_pretrained(str(folder))
    return folder
