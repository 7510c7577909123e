"""What projections receive, block by block, equals what they receive in the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from adaconvert.errors import OptionError
from adaconvert.io.source import Source
from adaconvert.layerwise.dense_view import dense_view
from adaconvert.layerwise.projection_data import projection_layers
from adaconvert.layerwise.runner import LayerwiseModel
from adaconvert.layerwise.work import WorkFolder
from adaconvert.modeling.loading import load_model
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.networks_by_hand import add_networks
from adaconvert.testing.tiny_models import make

IDS = numpy.arange(3 * 16).reshape(3, 16) * 7 % 300
KEPT = numpy.arange(16)[None] < numpy.array([[16], [11], [16]])
PATHS = {
    "llama": {r: f"model.layers.{{}}.self_attn.{r}_proj" for r in "qkvo"},
    "qwen2": {r: f"model.layers.{{}}.self_attn.{r}_proj" for r in "qkvo"},
    "gpt2": {"o": "transformer.h.{}.attn.c_proj"},
}


class Tokens:
    ids, weights, digest = IDS, KEPT, "d"


def whole(folder: Path, paths: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return inputs and outputs of modules for the unpadded tokens, from one pass."""
    model: Any = load_model(folder, dtype="float32")
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    kept = torch.from_numpy(KEPT)
    for path in paths:

        def keep(_: Any, args: Any, out: torch.Tensor, path: str = path) -> None:
            seen[path] = (args[0][kept], out[kept])

        model.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        model(torch.from_numpy(IDS), use_cache=False)
    return seen


@pytest.mark.parametrize("family", list(PATHS))
def test_inputs_and_matrices_are_the_whole_model_s(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path / "m")
    roles = tuple(PATHS[family])
    expected = whole(folder, [t.format(i) for t in PATHS[family].values() for i in range(2)])
    layers = 0
    for layer in projection_layers(folder, Tokens(), roles=roles, layers=[0, 1]):
        layers += 1
        assert not layer.networks
        for role in roles:
            inputs, outputs = expected[PATHS[family][role].format(layer.index)]
            assert torch.equal(layer.inputs[role], inputs)
            found = layer.matrices[role](layer.inputs[role])
            assert (found - outputs).abs().max() <= 1e-6 * outputs.abs().max()
    assert layers == 2


def test_only_the_layers_and_roles_asked_for(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m", layers=3)
    found = list(projection_layers(folder, Tokens(), roles=("v",), layers=[1]))
    assert [layer.index for layer in found] == [1]
    assert set(found[0].inputs) == set(found[0].matrices) == {"v"}


def with_networks(tmp_path: Path, **options: Any) -> Path:
    dense = make("llama", tmp_path / "dense", layers=3, max_shard_size="1GB")
    folder = make_adaptive(dense, tmp_path / "adaptive", select={"rule": "top-k", "k": 2})
    add_networks(folder, select={"rule": "top-k", "k": 1}, **options)
    return folder


def test_a_model_with_networks_runs_block_by_block_with_every_neuron_on(tmp_path: Path) -> None:
    folder = with_networks(tmp_path, layers=(0, 2))
    model: Any = load_model(folder, dtype="float32")
    ids = torch.from_numpy(IDS)
    alone = LayerwiseModel(dense_view(folder))
    hidden = alone.embed(ids)
    for block in alone.blocks():
        hidden = block(hidden)
    with torch.no_grad(), model.set_select("all"):
        assert torch.equal(alone.head(hidden), model(ids, use_cache=False).logits)
    assert not alone.keys


def test_networks_are_yielded_where_matrices_are_gone(tmp_path: Path) -> None:
    folder = with_networks(tmp_path, layers=(1,), roles="qo")
    model: Any = load_model(folder, dtype="float32")
    layers = list(projection_layers(folder, Tokens(), roles=("q", "k", "o"), layers=[0, 1]))
    assert set(layers[0].matrices) == {"q", "k", "o"}
    assert set(layers[1].matrices) == {"k"}
    site = model.model.layers[1].self_attn.o_proj
    weights = layers[1].networks["o"]
    x = layers[1].inputs["o"]
    with torch.no_grad():
        assert torch.equal(weights.output(weights.hidden(x)), site.down(site.act(site.up(x))))


def test_view_of_a_split_model_without_networks_is_stock(tmp_path: Path) -> None:
    dense = make("llama", tmp_path / "dense")
    view = dense_view(make_adaptive(dense, tmp_path / "adaptive"))
    assert "adaptive" not in view.config
    assert set(view.tensors) == set(Source.open(dense).tensors)


def test_a_killed_run_goes_on_from_its_last_block(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m", layers=3)
    at_once = {
        layer.index: layer.inputs["q"].clone()
        for layer in projection_layers(folder, Tokens(), roles=("q", "o"), layers=range(3))
    }
    run = projection_layers(
        folder, Tokens(), roles=("q", "o"), layers=range(3), work=WorkFolder(tmp_path / "w", "d")
    )
    next(run)
    next(run)
    run.close()
    rest = projection_layers(
        folder, Tokens(), roles=("q", "o"), layers=range(3), work=WorkFolder(tmp_path / "w", "d")
    )
    found = {layer.index: layer.inputs["q"].clone() for layer in rest}
    assert sorted(found) == [1, 2]
    assert all(torch.equal(found[index], at_once[index]) for index in found)


def test_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"is an encoder; its projections cannot be run layer"):
        next(projection_layers(make("bert", tmp_path / "m"), Tokens(), roles=("q",), layers=[0]))
