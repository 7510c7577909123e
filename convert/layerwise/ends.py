"""The two ends of a decoder, embedding and head, with a seam where its blocks were.

The stock class is built with one block, which a pass-through takes the place of before any weight
is loaded; so embedding scale, position embeddings, final norm and logit multipliers are
transformers' own.

Shapes: B sequences, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaconvert.layerwise.build import find_blocks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class Seam:
    """What passes between the embedding side and the head side of a model without blocks."""

    def __init__(self) -> None:
        self._arrived: torch.Tensor | None = None
        self._replacement: torch.Tensor | None = None

    def put(self, hidden: torch.Tensor) -> None:
        """Let the head side receive `hidden` [B, S, H] from now on."""
        self._replacement = hidden

    def clear(self) -> None:
        """Let the head side receive what the embedding side sends again."""
        self._replacement = None

    def taken(self) -> torch.Tensor:
        """Return what the embedding side sent last, [B, S, H]."""
        assert self._arrived is not None, "the model has not run"
        return self._arrived

    def cross(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the head side receives when the embedding side sends `hidden`."""
        self._arrived = hidden
        return hidden if self._replacement is None else self._replacement


def ends_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass of a stock class whose only block passes its input through a `Seam`."""
    from torch import nn

    class PassThrough(nn.Module):
        def __init__(self, replaced: nn.Module) -> None:
            super().__init__()
            self.seam = Seam()
            # some backbones ask a block which attention it has
            for name in ("attention_type", "layer_type"):
                if isinstance(getattr(replaced, name, None), str):
                    setattr(self, name, getattr(replaced, name))

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.seam.cross(hidden_states)

    def initialise(self: Any, config: PreTrainedConfig) -> None:
        stock.__init__(self, config)
        blocks = find_blocks(self)
        blocks[0] = PassThrough(blocks[0])

    # the module name tells transformers whether a class is stock
    members = {"__init__": initialise, "__module__": stock.__module__}
    return type(stock.__name__, (stock,), members)


def seam_of(model: PreTrainedModel) -> Seam:
    """Return the seam of a model of an `ends_class`."""
    seam = find_blocks(model)[0].seam
    assert isinstance(seam, Seam)
    return seam
