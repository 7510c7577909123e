"""What skipping a block saves, and what deciding costs.

Counted as for exits: what is routed is the matrices of a block and its attention for the tokens
that run it, matrices of keys and values (and of queries, which stock code computes before them) for
those that skip it where these are kept, routers for all, adapters for those that skip.

Shapes: B sequences, S positions of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adaptive_context import Call, LayerAccount
from .adaptive_exit_costs import attention_of, matrices_of, mean_attention


@dataclass(frozen=True)
class BlockCosts:
    """Of one token in one block.

    Attributes:
        config: of the model.
        flops, size: of its matrices that belong to no site, and their bytes.
        keys_flops, keys_size: of those that a skipped token runs.
        router_flops, router_size: of what decides.
        adapter_flops, adapter_size: of what a skipped token runs instead.
        usual: FLOPs of attention per token in a text of the reference's length.
    """

    config: Any
    flops: int
    size: int
    keys_flops: int
    keys_size: int
    router_flops: int
    router_size: int
    adapter_flops: int
    adapter_size: int
    usual: float


def block_costs(model: Any, inside: set[int]) -> dict[str, BlockCosts]:
    """Return the costs of every routed block, by path.

    Args:
        model: adaptive.
        inside: ids of modules that sites are made of.
    """
    found = {}
    length = int(model.config.adaptive["reference"]["length"])
    for path, block in model.adaptive_depth().items():
        spec = block.adaptive_layer
        keys = [
            matrices_of(block.get_submodule(name), inside, model.config) for name in spec["keys"]
        ]
        flops, size = matrices_of(block, inside, model.config)
        router_flops, router_size, adapter_flops, adapter_size = block.depth.costs()
        found[path] = BlockCosts(
            config=model.config,
            flops=flops,
            size=size,
            keys_flops=sum(flops for flops, _ in keys),
            keys_size=sum(size for _, size in keys),
            router_flops=router_flops,
            router_size=router_size,
            adapter_flops=adapter_flops,
            adapter_size=adapter_size,
            usual=mean_attention(model.config, spec["index"], length),
        )
    return found


def count_block(
    call: Call,
    path: str,
    spec: Mapping[str, Any],
    run: Tensor,
    real: Tensor | None,
    attended: int | None,
    *,
    looked: bool,
) -> None:
    """Add to the account of a pass what its tokens did not run of a block, and what it cost.

    Args:
        call: of the pass.
        path: of the block.
        spec: its "layer" slot.
        run: bool [B, S] who ran.
        real: bool [B, S], None when all tokens are.
        attended: positions that those who ran saw, summed; None for what they see anyway.
        looked: the router was asked.
    """
    account = call.account
    assert account is not None
    costs: BlockCosts = account.block_costs[path]
    which = torch.ones_like(run) if real is None else real.to(run.device)
    tokens, ran = int(which.sum()), int((run & which).sum())
    gone = tokens - ran
    site = account.layers.setdefault(path, LayerAccount())
    site.tokens += tokens
    site.run += ran
    asked = tokens if looked else 0
    account.depth_flops += asked * costs.router_flops + gone * costs.adapter_flops
    account.depth_bytes += asked * costs.router_size + gone * costs.adapter_size
    account.skipped_flops += gone * (costs.flops - costs.keys_flops)
    account.skipped_bytes += gone * (costs.size - costs.keys_size)
    account.skipped_reference += gone * (costs.flops - costs.keys_flops)
    if call.seen is None or call.seen.shape != run.shape:
        account.skipped_reference += gone * costs.usual
        return
    seen = call.seen
    whole = attention_of(costs.config, spec["index"], seen[which.cpu()])
    if attended is None:
        spent = attention_of(costs.config, spec["index"], seen[(run & which).cpu()])
    else:
        spent = attention_of(costs.config, spec["index"], torch.tensor([attended]), near=False)
    account.skipped_flops += whole - spent
    account.skipped_reference += costs.usual * tokens * (1 - spent / whole if whole else 0.0)
