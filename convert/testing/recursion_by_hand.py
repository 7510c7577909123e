"""Checkpoints of blocks that share matrices made by hand from dense ones, for tests of the runtime
alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.modeling.loading import CODE_FILES, code_folder, load_model
from adaconvert.testing.exits_by_hand import PLACES

if TYPE_CHECKING:
    from torch import Tensor


def linears_of(blocks: Any) -> list[str]:
    """Return the paths of the linears that every block has."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = [
        [name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        for block in blocks
    ]
    return [name for name in found[0] if all(name in other for other in found)]


def out_in(module: Any) -> Tensor:
    """Return the matrix of a linear, [out, in], in float64."""
    from transformers.pytorch_utils import Conv1D

    weight: Tensor = module.weight.detach().double()
    return weight.T if isinstance(module, Conv1D) else weight


def by_hand(dense: Path, folder: Path, rank: int | str, base: list[int]) -> Path:
    """Write a dense checkpoint with the mean of the matrices of each group, and residuals of the
    largest singular values, as the runtime saves it; return `folder`.

    Args:
        dense: checkpoint of a family in `PLACES`.
        folder: to write.
        rank: of residuals, or "full".
        base: the depth whose matrices each depth uses.
    """
    import torch

    with torch.no_grad():
        return _by_hand(dense, folder, rank, base)


def _by_hand(dense: Path, folder: Path, rank: int | str, base: list[int]) -> Path:
    import torch

    from adaconvert.modeling import modeling_adaptive

    stock = load_model(dense, dtype="float64")
    family, architecture = stock.config.model_type, type(stock).__name__
    blocks: Any = stock.get_submodule(PLACES[family][0])
    names = linears_of(blocks)
    config = json.loads((dense / "config.json").read_text())
    config["adaptive"] = {
        "version": 1,
        "base": {
            "architecture": architecture,
            "config": type(stock.config).__name__,
            "model_type": family,
        },
        "reference": {"flops_per_token": 10**6, "ffn_flops_per_token": 0, "length": 512},
        "sites": {},
        "model": {
            "exits": None,
            "recursion": {
                "blocks": PLACES[family][0],
                "base": base,
                "rank": rank,
                "linears": names,
                "sharing": "cycle",
                "start": "average",
            },
            "decode_policy": None,
        },
        "calibration": None,
    }
    config["model_type"] = f"adaptive_{family}"
    config["architectures"] = [f"Adaptive{architecture}"]
    config["auto_map"] = {
        "AutoConfig": f"configuration_adaptive.Adaptive{type(stock.config).__name__}",
        "AutoModelForCausalLM": f"modeling_adaptive.Adaptive{architecture}",
    }
    made: Any = getattr(modeling_adaptive, f"Adaptive{architecture}")
    model = made(made.config_class(**config)).double()
    shared = {
        f"{PLACES[family][0]}.{at}.{name}.weight"
        for at, first in enumerate(base)
        if base.count(first) > 1
        for name in names
    }
    own = model.state_dict()
    for name, value in stock.state_dict().items():
        if name not in shared:
            own[name].copy_(value)
    for first in set(base):
        group = [at for at, other in enumerate(base) if other == first]
        for name in names if len(group) > 1 else ():
            whole = [out_in(blocks[at].get_submodule(name)) for at in group]
            mean = torch.stack(whole).mean(0)
            mine = model.get_submodule(PLACES[family][0])
            target = mine[first].get_submodule(name)
            out_in(target).copy_(mean)
            for at, matrix in zip(group, whole, strict=True):
                linear = mine[at].get_submodule(name)
                assert linear.weight is target.weight
                if hasattr(linear, "residual"):
                    left, values, right = torch.linalg.svd(matrix - mean, full_matrices=False)
                    r = len(linear.residual.down)
                    linear.residual.up.copy_(left[:, :r] * values[:r])
                    linear.residual.down.copy_(right[:r])
    model.save_pretrained(folder)
    for name in CODE_FILES:
        (folder / name).write_bytes((code_folder() / name).read_bytes())
    return folder
