"""A classifier of images run block by block, against the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from adaconvert.data.images import image_blocks, read_images
from adaconvert.errors import OptionError
from adaconvert.layerwise.ffn_data import ffn_layers
from adaconvert.layerwise.runner import LayerwiseModel
from adaconvert.layerwise.vision import LayerwiseVision
from adaconvert.testing import tiny_models
from adaconvert.testing.tiny_images import save_images

CLASSES = ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("family", ["vit", "vit-no-bias"])
def test_blocks_equal_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = tiny_models.make(family, tmp_path / "vit", layers=3)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        expected = whole(pixel_values=pixels, output_hidden_states=True)
    model = LayerwiseVision(folder)
    hidden = model.embed(pixels)
    assert torch.equal(hidden, expected.hidden_states[0])
    for block in model.blocks():
        hidden = block(hidden)
        if block.index < 2:
            assert torch.equal(hidden, expected.hidden_states[block.index + 1])
    assert torch.equal(model.head(hidden), expected.logits)
    parts = [model.head(hidden[:2]), model.head(hidden[2:])]
    assert torch.equal(model.head(hidden, chunk=2), torch.cat(parts))
    assert torch.equal(model.embed(pixels), expected.hidden_states[0])
    assert not model.keys


def test_what_the_networks_receive_and_pass_on(tmp_path: Path) -> None:
    folder = tiny_models.make("vit", tmp_path / "vit")
    model = AutoModelForImageClassification.from_pretrained(folder)
    images = read_images(save_images(tmp_path / "in", CLASSES, 4), folder, model.config)
    blocks = image_blocks(images, seed=3)
    seen: list[torch.Tensor] = []
    given: list[torch.Tensor] = []
    for layer in model.vit.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        layer.mlp.register_forward_hook(lambda _, args, out: given.append(out.flatten(0, 1)))
    with torch.no_grad():
        model(pixel_values=blocks.pixels(range(len(blocks))))
    for layer in ffn_layers(folder, blocks):
        assert layer.inputs.shape == (12 * 5, 32)
        assert torch.equal(layer.inputs, seen[layer.index])
        output = layer.weights.output(layer.weights.hidden(layer.inputs))
        assert torch.equal(output, given[layer.index])


def test_models_and_data_that_do_not_go_together(tmp_path: Path) -> None:
    vit, llama = tiny_models.make("vit", tmp_path / "v"), tiny_models.make("llama", tmp_path / "l")
    with pytest.raises(OptionError, match="llama classifies no images"):
        LayerwiseVision(llama)
    with pytest.raises(OptionError, match="vit is no language model"):
        LayerwiseModel(vit)
