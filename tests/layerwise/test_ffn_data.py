"""FFN inputs block by block: those of the whole model, padding left out, resumable, replaceable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from adaconvert.errors import OptionError, ResourceError, SourceError
from adaconvert.io.source import Source
from adaconvert.layerwise.ffn_data import FfnLayer, ffn_layers, run_digest
from adaconvert.layerwise.ffn_weights import ExpertNorms
from adaconvert.layerwise.work import WorkFolder
from adaconvert.testing.tiny_models import make

LENGTH = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    ids: Any
    weights: Any
    digest: str = "d"


def blocks(rows: int = 3, lengths: tuple[int, ...] = (24, 24, 7)) -> Blocks:
    ids = numpy.arange(rows * LENGTH).reshape(rows, LENGTH) * 7 % 300
    weights = numpy.arange(LENGTH) < numpy.array(lengths)[:, None]
    return Blocks(ids=numpy.where(weights, ids, 0), weights=weights)


def of_whole_model(folder: Path, tokens: Blocks, names: tuple[str, ...]) -> dict[str, Any]:
    """Return inputs of the named modules on unpadded tokens, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:

        def keep(_: Any, args: Any, name: str = name) -> None:
            found[name].append(args[0].reshape(-1, args[0].shape[-1]))

        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        for ids, kept in zip(tokens.ids, tokens.weights, strict=True):
            model(torch.from_numpy(ids[kept])[None], use_cache=False)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


CASES = {
    "llama": ("model.layers.{i}.mlp", "down_proj"),
    "llama-mlp-bias": ("model.layers.{i}.mlp", "down_proj"),
    "gemma": ("model.layers.{i}.mlp", "down_proj"),
    "gemma3_text": ("model.layers.{i}.mlp", "down_proj"),
    "phi3": ("model.layers.{i}.mlp", "down_proj"),
    "granite-bias": ("model.layers.{i}.mlp", "down_proj"),
    "olmo2": ("model.layers.{i}.mlp", "down_proj"),
    "gpt2": ("transformer.h.{i}.mlp", "c_proj"),
    "gpt_neox": ("gpt_neox.layers.{i}.mlp", "dense_4h_to_h"),
}


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """No entry is off by more than 1e-6 of the largest: 8 roundings of float32, for sums of at most
    64 products in another order; 4.2e-7 was the most of any family."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("family", CASES)
def test_inputs_and_hidden_activations_are_those_of_the_whole_model(
    family: str, tmp_path: Path
) -> None:
    folder, tokens = make(family, tmp_path / "m"), blocks()
    ffn, down = CASES[family]
    names = tuple(n for i in (0, 1) for n in (ffn.format(i=i), f"{ffn.format(i=i)}.{down}"))
    expected = of_whole_model(folder, tokens, names)
    for layer in ffn_layers(folder, tokens):
        path = ffn.format(i=layer.index)
        assert layer.inputs.shape == (55, 32)
        # sequences alone and in a padded batch: sums in another order
        assert_near(layer.inputs, expected[path])
        assert_near(layer.weights.hidden(layer.inputs), expected[f"{path}.{down}"])


def test_output_is_the_module_s(tmp_path: Path) -> None:
    folder = make("gpt2", tmp_path / "m")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = next(ffn_layers(folder, blocks()))
    with torch.no_grad():
        expected = model.transformer.h[0].mlp(layer.inputs)
    found = layer.weights.output(layer.weights.hidden(layer.inputs))
    assert_near(found, expected)


@pytest.mark.parametrize("width", [1, 4, 16, 64])
@pytest.mark.parametrize("shared", [0, 16])
def test_expert_norms_are_the_lengths_of_expert_outputs(
    width: int, shared: int, tmp_path: Path
) -> None:
    layer = next(ffn_layers(make("llama", tmp_path / "m", hidden_size=32), blocks()))
    if width > 64 - shared:
        width = 48
    order = numpy.random.default_rng(0).permutation(64)
    hidden = layer.weights.hidden(layer.inputs)
    norms = ExpertNorms.of(layer.weights, order, width=width, shared=shared)(hidden)
    for expert in range((64 - shared) // width):
        start = shared + expert * width
        mine = torch.from_numpy(order[start : start + width])
        output = hidden[:, mine] @ layer.weights.down.T[mine]
        assert_near(norms[:, expert], output.norm(dim=1))


def test_only_the_layers_asked_for_are_yielded_and_later_blocks_are_not_run(
    tmp_path: Path,
) -> None:
    folder = make("llama", tmp_path / "m", layers=4)
    assert [layer.index for layer in ffn_layers(folder, blocks(), layers=[1, 2])] == [1, 2]
    assert list(ffn_layers(folder, blocks(), layers=[])) == []


def test_a_replacement_reaches_the_later_blocks(tmp_path: Path) -> None:
    folder, tokens = make("llama", tmp_path / "m", layers=3), blocks()
    dense = [layer.inputs.clone() for layer in ffn_layers(folder, tokens)]
    same, halved = [], []
    for layer in ffn_layers(folder, tokens):
        same.append(layer.inputs.clone())
        weights = layer.weights
        layer.pass_on(lambda x, w=weights: w.output(w.hidden(x)))
    for layer in ffn_layers(folder, tokens):
        halved.append(layer.inputs.clone())
        if layer.index == 1:
            layer.pass_on(lambda x: torch.zeros_like(x))
    for ours, theirs in zip(same, dense, strict=True):
        assert_near(ours, theirs)
    assert torch.equal(halved[1], dense[1])
    # far more than any rounding
    assert (halved[2] - dense[2]).abs().max() > 0.1


def collect(folder: Path, work: WorkFolder | None, stop: int | None = None) -> dict[int, Any]:
    found = {}
    for layer in ffn_layers(folder, blocks(), work=work):
        if layer.index == stop:
            return found
        found[layer.index] = layer.inputs.numpy().copy()
        if work is not None:
            work.save(f"layer.{layer.index}", {"inputs": found[layer.index]})
    return found


def test_a_stopped_run_goes_on_from_the_last_finished_block(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m", layers=4)
    digest = run_digest(Source.open(folder), blocks(), "options")
    whole = collect(folder, None)
    first = collect(folder, WorkFolder(tmp_path / "w", digest), stop=2)
    again = WorkFolder(tmp_path / "w", digest)
    assert again.next_block == 2
    rest = collect(folder, again)
    assert sorted(first) == [0, 1]
    assert sorted(rest) == [2, 3]
    for index, inputs in {**first, **rest}.items():
        numpy.testing.assert_array_equal(inputs, whole[index])
        numpy.testing.assert_array_equal(again.load(f"layer.{index}")["inputs"], inputs)
    # what is finished does not stay on disk
    assert not (tmp_path / "w" / "hidden.2.bin").exists()


def test_a_work_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    WorkFolder(tmp_path / "w", "a")
    with pytest.raises(OptionError, match="belongs to another run"):
        WorkFolder(tmp_path / "w", "b")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("")
    with pytest.raises(OptionError, match=r"not of such a run; found thesis\.tex"):
        WorkFolder(tmp_path / "x", "a")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["thesis.tex"]
    (tmp_path / "w" / "layerwise.json").write_text("{")
    with pytest.raises(OptionError, match="journal cannot be read"):
        WorkFolder(tmp_path / "w", "a")


def test_missing_states_of_an_interrupted_run_are_said(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m", layers=3)
    work = WorkFolder(tmp_path / "w", "a")
    collect(folder, work, stop=1)
    (tmp_path / "w" / "hidden.1.bin").unlink()
    with pytest.raises(OptionError, match="hidden states of the interrupted run are missing"):
        collect(folder, WorkFolder(tmp_path / "w", "a"))


def test_too_much_for_memory_without_a_work_folder(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m")
    with pytest.raises(ResourceError, match=r"more than 1 kB of memory.*work folder"):
        next(ffn_layers(folder, blocks(), memory=1000))
    work = WorkFolder(tmp_path / "w", "a")
    assert isinstance(next(ffn_layers(folder, blocks(), work=work, memory=1000)), FfnLayer)


def test_the_run_digest_tells_model_data_and_options_apart(tmp_path: Path) -> None:
    source = Source.open(make("llama", tmp_path / "m"))
    other = Blocks(ids=blocks().ids, weights=blocks().weights, digest="e")
    found = {
        run_digest(source, blocks(), 1),
        run_digest(source, other, 1),
        run_digest(source, blocks(), 2),
    }
    assert len(found) == 3


def test_unusable_tokens(tmp_path: Path) -> None:
    folder, good = make("llama", tmp_path / "m"), blocks()
    bad = numpy.where(good.ids == 7, 320, good.ids)
    with pytest.raises(OptionError, match=r"no embedding for.*0 to 319, found 320"):
        next(ffn_layers(folder, Blocks(ids=bad, weights=good.weights)))
    with pytest.raises(OptionError, match="has padding before tokens"):
        next(ffn_layers(folder, Blocks(ids=good.ids, weights=good.weights[:, ::-1])))
    with pytest.raises(OptionError, match="holds no tokens"):
        next(ffn_layers(folder, Blocks(ids=good.ids, weights=numpy.zeros_like(good.weights))))
    long = numpy.zeros((1, 300), dtype=numpy.int64)
    with pytest.raises(OptionError, match=r"longer than the model's positions.*256, found 300"):
        next(ffn_layers(folder, Blocks(ids=long, weights=long == 0)))


def test_models_without_dense_decoder_layers_are_refused(tmp_path: Path) -> None:
    for family, what in (("bert", "is an encoder"), ("mixtral", "is a mixture of experts")):
        with pytest.raises(OptionError, match=what):
            next(ffn_layers(make(family, tmp_path / "m"), blocks()))


def test_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make("llama", tmp_path / "m", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = ffn_layers(folder, blocks())
    assert next(run).index == 0
    with pytest.raises(SourceError, match="after block 1 hold NaN or infinity"):
        next(run)
