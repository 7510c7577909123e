"""What leaving early saves, and what looking at exits costs.

A token that left after `depth` blocks ran the matrices and the attention of these alone, the tail
of every exit it was looked at, and not the model's own. That is what is routed; what "recompute"
runs later for exact keys and values is spent all the same, and no part of it. Sites that choose
experts count the tokens that reach them.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .adaptive_context import Account, current, entered
from .adaptive_costs import is_causal, matrix_size, mixed_size
from .adaptive_stages import Stage


def exit_modules(model: Any) -> set[int]:
    """Return the ids of the modules that exits are made of, which no token has to pass."""
    return {id(part) for head in model.adaptive_exits().values() for part in head.modules()}


def count_left(
    model: Any,
    account: Account,
    depth: Tensor,
    seen: Tensor,
    looked: Sequence[int],
    *,
    inside: set[int],
) -> None:
    """Add to an account what tokens that may leave early did not run, and what exits cost.

    Args:
        model: adaptive, with exits.
        account: has counted every block for every token.
        depth: int64 [T], blocks each token ran.
        seen: int64 [T], positions each token attends to where nothing slides.
        looked: exits that were looked at, by the blocks before them.
        inside: ids of modules that sites are made of.
    """
    exits = model.adaptive_runtime.exits
    blocks = model.get_submodule(exits["blocks"])
    depth, seen = depth.cpu(), seen.cpu()
    for index, block in enumerate(blocks):
        gone = depth <= index
        number = int(gone.sum())
        if not number:
            continue
        flops, size = matrices_of(block, inside, model.config)
        usual = mean_attention(model.config, index, int(account.reference["length"]))
        account.skipped_flops += number * flops + attention_of(model.config, index, seen[gone])
        account.skipped_reference += number * (flops + usual)
        account.skipped_bytes += number * size
    if exits["kind"] == "classifier":
        # heads run once a text, and are counted nowhere
        return
    own = _tail(model, None, inside)
    left = int((depth < len(blocks)).sum())
    account.skipped_flops += left * own[0]
    account.skipped_reference += left * own[0]
    account.skipped_bytes += left * own[1]
    for at in looked:
        here = int((depth >= at).sum())
        flops, size = _tail(model, at, inside)
        account.exit_flops += here * flops
        account.exit_bytes += here * size


def counts_sites(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Return whether a pass has to be repeated so that sites count what tokens reach them.

    Behind a cache it cannot be: what it added is in there, and every token counts everywhere.
    """
    runtime = model.adaptive_runtime
    found = runtime.sites or runtime.adapted or runtime.routed
    return bool(found) and inputs.get("past_key_values") is None


def count_sites(model: Any, trace: list[Tensor], depth: Tensor, inputs: Mapping[str, Any]) -> None:
    """Let sites count the tokens that reach them, once it is known where these left.

    The blocks run once more, each on what it was given before.

    Args:
        model: adaptive, with exits.
        trace: [B, S, d] what each block gave.
        depth: int64 [B, S], blocks each token ran.
        inputs: of the pass.
    """
    names = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}
    given = {name: value for name, value in inputs.items() if name in names}
    stage = Stage(0, len(trace), trace=trace, depth=depth)
    with entered(replace(current(), stage=stage, collected={})), torch.no_grad():
        model.base_model(**given, use_cache=False)


def matrices_of(module: Any, inside: set[int], config: Any) -> tuple[int, int]:
    """Return FLOPs and bytes per token of the matrices in a module that belong to no site."""
    flops = size = 0
    for part in module.modules():
        skipped = id(part) in inside or hasattr(part, "base_layer")
        found = None if skipped else matrix_size(part) or mixed_size(part, config)
        if found is not None:
            flops += 2 * found[0]
            size += found[1]
    return flops, size


def _tail(model: Any, at: int | None, inside: set[int]) -> tuple[int, int]:
    """Return FLOPs and bytes of what a token passes at an exit; None for the model's own end."""
    head = None if at is None else model.adaptive_exits()[at]
    flops, size = (0, 0) if head is None else matrices_of(head, set(), model.config)
    for role, path in model.adaptive_runtime.exits["tail"].items():
        if head is None or head.part(role) is None:
            more = matrices_of(model.get_submodule(path), inside, model.config)
            flops, size = flops + more[0], size + more[1]
    return flops, size


def mean_attention(config: Any, index: int, length: int) -> float:
    """Return the FLOPs per token of one block's attention in a text of the reference's length."""
    seen = torch.arange(1, length + 1) if is_causal(config) else torch.full((length,), length)
    return attention_of(config, index, seen) / length


def attention_of(config: Any, index: int, seen: Tensor, *, near: bool = True) -> int:
    """Return the FLOPs of one block's scores and weighted sums.

    Args:
        config: of the model.
        index: of the block.
        seen: positions that tokens attend to.
        near: within the block's window, where it has one; else `seen` is what they do attend to.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    both = getattr(config, "qk_head_dim", head) + getattr(config, "v_head_dim", head)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding" in kinds[index] if kinds else window is not None
    found = seen.clamp_max(window) if near and slides and window else seen
    return int(2 * heads * both * int(torch.sum(found)))
