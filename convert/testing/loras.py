"""Stock LoRA adapters of tiny models, as PEFT writes them; nothing of `methods` is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaconvert.modeling.loading import load_model


def make_lora(dense: Path, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """Return `folder`, now a LoRA of a dense model whose second factors are random too.

    Args:
        dense: checkpoint it is for.
        folder: where to.
        seed: of the factors.
        options: of peft's LoraConfig; q_proj and v_proj of rank 4 when not given.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    given = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, **options}
    generator = torch.Generator().manual_seed(seed)
    base: Any = load_model(dense)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(str(folder))
    return folder


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Return `folder` after `change` was made to its adapter_config.json."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def rename_tensors(folder: Path, rename: Callable[[str], str | None]) -> Path:
    """Return `folder` with its tensors under other names, without those that get None."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    found = {name: rename(name) for name in load_file(path)}
    tensors = {new: load_file(path)[name] for name, new in found.items() if new is not None}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
