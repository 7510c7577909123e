"""A classifier of images run one block at a time, as `runner` runs language models.

Shapes: B images, C channels, P x Q pixels, S positions, H hidden size, V classes.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from adaconvert.layerwise.build import image_class, load
from adaconvert.layerwise.configs import one_block, without_sites
from adaconvert.layerwise.ends import ends_class, seam_of
from adaconvert.layerwise.names import block_of
from adaconvert.layerwise.runner import Block, LayerwiseModel
from adaconvert.layerwise.stored import stored_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class VisionBlock(Block):
    """One loaded block of a vision model."""

    def _inputs(self, hidden: torch.Tensor) -> dict[str, Any]:
        # an image of one patch: what the embedding makes of it is replaced by `hidden`
        return {"pixel_values": _blank(self._backbone.config, hidden)}


class LayerwiseVision(LayerwiseModel):
    """A checkpoint that classifies images, of which at most one block is in memory."""

    _class_of = staticmethod(image_class)
    _block_class = VisionBlock

    def _config_of(self, index: int) -> PreTrainedConfig:
        config: Any = one_block(self.config, index)
        config.image_size = config.patch_size
        return config

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the first block receives for pixel values, [B, C, P, Q] -> [B, S, H]."""
        import torch

        with torch.no_grad():
            self._whole_ends.base_model(pixel_values=pixels)
        return seam_of(self._whole_ends).taken()

    def head(self, hidden: torch.Tensor, *, chunk: int = 256) -> torch.Tensor:
        """Return the logits of final hidden states, [B, S, H] -> [B, V].

        Args:
            hidden: output of the last block, before the final norm.
            chunk: images per call.
        """
        import torch

        model: Any = self._whole_ends
        pieces = []
        for piece in torch.split(hidden, chunk):
            seam_of(model).put(piece)
            with torch.no_grad():
                pieces.append(model(pixel_values=_blank(model.config, piece)).logits)
        seam_of(model).clear()
        return torch.cat(pieces)

    @cached_property
    def _whole_ends(self) -> PreTrainedModel:
        """The model without blocks: both its ends are small, so they stay."""
        model, keys = load(
            ends_class(self._class),
            without_sites(one_block(self.config, 0)),
            stored_tensors(self.source, self.count, keep=lambda name: block_of(name) is None),
            dtype=self.dtype,
        )
        self._note(keys, None)
        return model


def _blank(config: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return an image without content for each of `hidden` [B, S, H], of the model's size."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return hidden.new_zeros(len(hidden), config.num_channels, height, width)
