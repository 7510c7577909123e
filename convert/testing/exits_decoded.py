"""Decoding of tiny models with exits, computed the long way, for tests of the fast one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.exits_by_hand import PLACES, by_hand

BLOCKS = 4
DECODERS = [family for family in PLACES if family not in ("bert", "vit")]


def model_with_exits(
    root: Path, family: str, places: Sequence[int], kind: str = "norm", **options: Any
) -> Any:
    """Return a tiny model of `BLOCKS` blocks with exits whose heads differ a little from its own.

    Args:
        root: folder for checkpoints; dense ones are made once.
        family: a key of `PLACES`.
        places, kind, options: see `exits_by_hand`.
    """
    import torch

    dense = root / family
    if not dense.exists():
        tiny_models.make(family, dense, layers=BLOCKS, max_shard_size="1GB")
    folder = root / f"{family}-{len(list(root.iterdir()))}"
    model: Any = load_model(by_hand(dense, folder, places, kind, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.get_submodule("exits").parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def prompts(rows: int, length: int, seed: int = 0, *, vocab: int = 300) -> dict[str, Any]:
    """Return a left-padded batch of random tokens: `input_ids` and `attention_mask`."""
    import torch

    ids = torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : (3 * row) % (length - 1)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def alone(batch: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Return one row of a batch without its padding."""
    kept = batch["attention_mask"][row].bool()
    return {name: value[row][kept][None] for name, value in batch.items()}


def teacher_forced(model: Any, sequences: Any, mask: Any, prompt: int) -> dict[int, Any]:
    """Return logits of every exit, and of the model under L, for each new token, [B, new, V].

    Args:
        model: with exits.
        sequences: [B, prompt + new].
        mask: [B, prompt].
        prompt: tokens of the prompt.
    """
    import torch

    grown = torch.ones(len(sequences), sequences.shape[1] - prompt, dtype=mask.dtype)
    mask = torch.cat([mask, grown], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        states = model.exit_states(input_ids=sequences, attention_mask=mask, position_ids=positions)
        return {
            at: model.exit_logits(at, state)[:, prompt - 1 : -1] for at, state in states.items()
        }
