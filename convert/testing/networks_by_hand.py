"""Networks in place of attention projections, put into adaptive checkpoints by hand.

Their weights are random, so the result computes something else than the dense model; tests compare
it with plain modules that hold the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from adaconvert.arch.projections import Network, projection_sites, stock_spec
from adaconvert.arch.registry import describe

#: hidden units of the routers.
ROUTER_WIDTH = 8


def add_networks(
    folder: Path,
    roles: Collection[str] = ("q", "k", "v", "o"),
    *,
    experts: int = 4,
    width: int = 3,
    layers: Collection[int] | None = None,
    select: Mapping[str, Any] | None = None,
    keep_ffn: bool = True,
) -> list[str]:
    """Return the paths of the projections that are random networks now.

    Args:
        folder: adaptive checkpoint in one file; changed.
        roles: which projections.
        experts, width: of each network; one expert has no router.
        layers: blocks; all when not given.
        select: selection of each; all experts when not given.
        keep_ffn: leave the split feed-forward networks in `config.adaptive`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file, where = folder / "model.safetensors", folder / "config.json"
    tensors, config = load_file(file), json.loads(where.read_text())
    adaptive = config["adaptive"]
    if not keep_ffn:
        adaptive["sites"] = {}
        adaptive["reference"]["ffn_flops_per_token"] = 0
        own = (".neuron_order", ".router.")
        tensors = {n: t for n, t in tensors.items() if not any(part in n for part in own)}
    generator = torch.Generator().manual_seed(2)
    routed = {"kind": "contribution", "width": ROUTER_WIDTH}
    paths, flops = [], 0
    for path, site in projection_sites(stock_spec(describe(config, tensors))).items():
        if site.role not in roles or (layers is not None and site.layer not in layers):
            continue
        biased = site.bias is not None
        network = Network(
            role=site.role,
            hidden=site.inputs,
            output=site.outputs,
            experts=experts,
            width=width,
            up_bias=biased,
            down_bias=biased,
            router=routed if experts > 1 else {"kind": "none"},
            select=dict(select or {"rule": "all"}),
        )
        dtype = tensors.pop(site.weight).dtype
        tensors.pop(site.bias or "", None)
        for name, (_, shape) in network.shapes().items():
            made = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            is_router = name.startswith("router.")
            tensors[f"{site.stored}.{name}"] = made if is_router else made.to(dtype)
        adaptive["sites"].setdefault(path, {})["linear"] = {"mlp": network.content()}
        flops += 2 * site.inputs * site.outputs
        paths.append(path)
    adaptive["reference"]["linear_flops_per_token"] = flops
    adaptive["reference"]["flops_per_token"] += flops
    save_file(tensors, file, metadata={"format": "pt"})
    where.write_text(json.dumps(config))
    return paths
