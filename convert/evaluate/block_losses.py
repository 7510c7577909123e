"""Losses and top predictions of one block of text, from its logits.

Shapes: S positions of a block, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def token_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[float, Tensor]:
    """Return the mean loss of one block and its top prediction at each position, [S - 1]."""
    from torch.nn.functional import cross_entropy

    wide = logits[:-1].float()
    real = mask[1:]
    losses = cross_entropy(wide[real], ids[1:][real], reduction="sum")
    top = wide.argmax(dim=-1).int()
    return float(losses.double() / real.sum()), top


def hidden_losses(logits: Tensor, ids: Tensor, places: Tensor) -> tuple[float, Tensor]:
    """Return the mean loss of one block's hidden tokens and its top predictions, [S]."""
    from torch.nn.functional import cross_entropy

    wide = logits.float()
    losses = cross_entropy(wide[places], ids[places], reduction="sum")
    return float(losses.double() / places.sum()), wide.argmax(dim=-1).int()
