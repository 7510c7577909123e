"""`inspect --activations`: the numbers are those of the model, and the verdict fits them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.activations import ActivationOptions, ActivationReport
from adaconvert.cli.main import run
from adaconvert.errors import DataError, OptionError, SourceError
from adaconvert.testing.tiny_models import make

TEXT = "Every tensor of the source is used or dropped with a reason. def route(token): return 0\n"
Report = Callable[..., ActivationReport]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT * (i + 1)}) + "\n" for i in range(3)))
    return path


def hidden_units(folder: Path, down: str, length: int) -> dict[int, torch.Tensor]:
    """Return what each down projection receives, [T, I], from the whole model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for index in found:

        def keep(_: Any, args: Any, index: int = index) -> None:
            found[index].append(args[0].reshape(-1, args[0].shape[-1]))

        model.get_submodule(down.format(i=index)).register_forward_pre_hook(keep)
    for count in (1, 2, 3):
        ids = tokenizer(TEXT * count)["input_ids"]
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            if len(piece) >= 2:
                with torch.no_grad():
                    model(torch.tensor([piece]), use_cache=False)
    return {index: torch.cat(pieces) for index, pieces in found.items()}


@pytest.mark.parametrize(
    ("family", "down", "extra"),
    [
        ("gpt2", "transformer.h.{i}.mlp.c_proj", {"activation_function": "relu"}),
        ("llama", "model.layers.{i}.mlp.down_proj", {}),
    ],
)
def test_numbers_are_those_of_the_model(
    family: str, down: str, extra: dict[str, object], data: Path, tmp_path: Path
) -> None:
    folder = make(family, tmp_path / "m", **extra)
    report = api.inspect_activations(folder, data, length=32)
    expected = hidden_units(folder, down, 32)
    assert report.tokens == len(expected[0])
    for layer in report.layers:
        a = expected[layer.layer].double()
        # within float32 rounding, no unit crosses one of the fractions more than here and there
        assert layer.zeros == pytest.approx((a == 0).double().mean().item(), abs=1e-4)
        largest = a.abs().amax(1, keepdim=True)
        for share, fraction in zip(layer.below, (10, 100, 1000), strict=True):
            small = (a.abs() < largest / fraction).double().mean().item()
            assert share == pytest.approx(small, abs=1e-3)
        hoyer = a.abs().sum(1).square() / a.square().sum(1) / a.shape[1]
        assert layer.hoyer == pytest.approx(hoyer.mean().item(), rel=1e-4)


def test_a_relu_model_has_exact_zeros_and_is_told_so(data: Path, tmp_path: Path) -> None:
    folder = make("gpt2", tmp_path / "m", activation_function="relu")
    report = api.inspect_activations(folder, data)
    assert 0.3 < report.mean.zeros < 0.7
    text = "\n".join(report.lines())
    if report.mean.zeros >= 0.5:
        assert "exactly zero, so skipping them costs nothing" in " ".join(text.split())
    assert report.activation == "relu"
    assert not report.gated


def test_a_model_mostly_zero_is_called_fit(data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make("gpt2", tmp_path / "m", activation_function="relu", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("mlp.c_fc.bias"):
            tensor -= 2.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = api.inspect_activations(folder, data)
    assert report.mean.zeros > 0.8
    assert "`d2dmoe` and `moefy` fit this model as it is" in report.verdict()[0]


def test_a_swiglu_model_has_none_and_is_warned(data: Path, tmp_path: Path) -> None:
    report = api.inspect_activations(make("llama", tmp_path / "m"), data)
    assert report.mean.zeros == 0
    first, second, third = report.verdict()
    assert first.startswith("SwiGLU (silu): no exact zeros")
    assert f"keeps {report.mean.half:.1%} of the output mass" in second
    assert "--router gate" in third


def test_mass_counts_the_neurons_that_reach_it(data: Path, tmp_path: Path) -> None:
    from adaconvert.activations import _token_rows

    hidden = torch.tensor([[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    rows = _token_rows(hidden, torch.ones(4))
    # squares 9, 1, 0, 0: 90 % is reached by the first, 95 % and 99 % by the first two
    assert rows[0, 5:8].tolist() == [0.25, 0.5, 0.5]
    assert rows[1, 5:8].tolist() == [1.0, 1.0, 1.0]
    assert rows[:, 8].tolist() == [1.0, 0.5]
    assert rows[:, 0].tolist() == [0.5, 0.0]
    assert rows[1, 4].item() == pytest.approx(1.0)


def test_a_split_checkpoint_is_measured_as_the_dense_one(data: Path, tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m")
    api.convert(folder, destination=tmp_path / "s", method="moefy", split="random", expert_width=8)
    dense = api.inspect_activations(folder, data).layers
    split = api.inspect_activations(tmp_path / "s", data).layers
    for ours, theirs in zip(split, dense, strict=True):
        assert ours.hoyer == pytest.approx(theirs.hoyer, rel=1e-5)
        assert ours.neurons == pytest.approx(theirs.neurons, abs=1e-3)


def test_json_and_text_of_the_command(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("llama", tmp_path / "m")
    arguments = ("inspect", str(folder), "--activations", "--data", str(data))
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert set(found["mean"]["below"]) == {"max/10", "max/100", "max/1000"}
    assert run(arguments) == 0
    text = capsys.readouterr().out
    assert "layer     zero" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert run(["inspect", str(folder), "--activations"]) == 2
    assert "--activations and --data go together" in capsys.readouterr().err


def test_bad_input_is_said(data: Path, tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m")
    (tmp_path / "other.jsonl").write_text('{"body": "words"}\n')
    with pytest.raises(DataError, match="body"):
        api.inspect_activations(folder, tmp_path / "other.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        api.inspect_activations(folder, tmp_path / "empty.jsonl")
    with pytest.raises(OptionError, match="--max-tokens: out of range"):
        ActivationOptions(max_tokens=1)
    with pytest.raises(OptionError, match="is an encoder"):
        api.inspect_activations(make("bert", tmp_path / "b"), data)


def test_nan_in_the_model_is_said(data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make("llama", tmp_path / "m", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="after block 0 hold NaN"):
        api.inspect_activations(folder, data)
