"""What becomes of sources other than float32 decoders, and what other verbs make of the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.errors import OptionError
from adaconvert.modeling.loading import load_model
from adaconvert.planning.functions import FUNCTIONS
from adaconvert.testing.stored import tensors_of

from .conftest import BLOCKS, logits_of, opened

Deep = Callable[..., Path]
#: linears of a llama's block.
LINEARS = 7
#: of float32 sums in another order, relative to the largest logit.
CLOSE = 1e-5
#: unit roundoff of bfloat16.
ROUNDOFF = 2**-8


def shared(source: Path, folder: Path, **options: Any) -> Path:
    """Write a recursive checkpoint, two loops unless told otherwise; return its folder."""
    given = {"method": "depth", "kind": "recursive", "loops": 2, **options}
    api.convert(source, destination=folder, **given)
    return folder


def as_float32(source: Path, made: Path) -> None:
    """Refuse logits in float32 that are not the source's."""
    expected = logits_of(opened(source))
    found = logits_of(load_model(made, dtype="float32"))
    assert float((found - expected).abs().max()) < CLOSE * float(expected.abs().max())


def test_experts_stay_each_depths_own(deep: Deep, tmp_path: Path) -> None:
    source = deep("mixtral")
    made = shared(source, tmp_path / "out", rank="full")
    as_float32(source, made)
    assert api.verify(source, made).ok
    before, after = tensors_of(source), tensors_of(made)
    kept = [name for name in before if "experts" in name or "gate.weight" in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    gone = {name.split(".", 3)[-1] for name in set(before) - set(after)}
    assert gone == {f"self_attn.{name}_proj.weight" for name in "qkvo"}


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForSequenceClassification"),
        ("vit", "ViTForImageClassification"),
    ],
)
def test_encoders_and_vision_models(
    family: str, architecture: str, deep: Deep, tmp_path: Path
) -> None:
    source = deep(family, architecture=architecture)
    made = shared(source, tmp_path / "out", rank="full")
    assert type(load_model(made)).__name__ == f"Adaptive{architecture}"
    as_float32(source, made)
    assert api.verify(source, made).ok
    less = shared(source, tmp_path / "less", rank=2)
    assert api.verify(source, less).ok
    sizes = [sum(t.numel() for t in tensors_of(folder).values()) for folder in (source, less)]
    assert sizes[1] < sizes[0]


def test_bfloat16_is_given_back_but_for_one_rounding(deep: Deep, tmp_path: Path) -> None:
    source = deep("llama", dtype="bfloat16")
    made = shared(source, tmp_path / "out", rank="full")
    before, after = tensors_of(source), tensors_of(made)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name, matrix in before.items():
        stem = name.removesuffix(".weight")
        up, down = (after.get(f"{stem}.residual.{part}") for part in ("up", "down"))
        if up is None or down is None:
            assert torch.equal(after[name], matrix)
            continue
        block = int(name.split(".")[2])
        owner = name.replace(f".{block}.", f".{block % (BLOCKS // 2)}.", 1)
        lost = matrix.double() - after[owner].double()
        # every entry of what the shared matrix loses is rounded once, and nothing else is
        assert bool(((lost - up.double() @ down.double()).abs() <= ROUNDOFF * lost.abs()).all())
    report = api.verify(source, made)
    assert report.ok
    assert "exact-fp32 (at most 0.03)" in "\n".join(report.lines())


def test_bfloat16_blocks_that_begin_as_the_shared_ones_stay_bit_for_bit(
    deep: Deep, tmp_path: Path
) -> None:
    source = deep("llama", dtype="bfloat16")
    made = tensors_of(shared(source, tmp_path / "out", rank="full", start="lower"))
    before = tensors_of(source)
    lower = [n for n in before if "layers." in n and int(n.split(".")[2]) < BLOCKS // 2]
    assert all(torch.equal(before[name], made[name]) for name in lower)
    ups = [name for name in made if name.endswith("residual.up")]
    for name in ups:
        product = made[name].double() @ made[name.replace(".up", ".down")].double()
        is_lower = int(name.split(".")[2]) < BLOCKS // 2
        assert bool((product == 0).all()) == is_lower
    assert len(ups) == BLOCKS * LINEARS


@pytest.mark.parametrize("rank", [4, 0])
def test_a_lower_rank_is_verified_as_what_needs_training(
    rank: int, deep: Deep, tmp_path: Path
) -> None:
    made = shared(deep("llama"), tmp_path / "out", rank=rank)
    report = api.verify(deep("llama"), made)
    assert report.ok
    said = "\n".join(report.lines())
    assert "needs-training (measured)" in said
    assert "every byte as written" in said
    # the measured difference is real
    assert "same for 100 %" not in said


def test_evaluate_compares_it_with_its_source(deep: Deep, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and slept. " * 40)
    given: dict[str, Any] = {
        **{"data": str(text), "length": 32, "speed": False, "dtype": "float32"},
        "reference": str(deep("llama")),
    }
    settings = {}
    for rank in (4, "full"):
        made = shared(deep("llama"), tmp_path / f"rank-{rank}", rank=rank)
        found = api.evaluate(made, **given)
        assert found.reference is not None
        settings[rank] = found.results[0]
        # the source's work and that of residuals
        costs, whole = api.inspect(made).costs, api.inspect(deep("llama")).costs
        own, base = settings[rank].compute, found.reference.compute
        assert costs is not None
        assert whole is not None
        assert own is not None
        assert base is not None
        assert own.flops - base.flops == pytest.approx(costs.flops - whole.flops, rel=1e-12)
        assert own.fraction == pytest.approx(own.flops / base.flops, rel=1e-12)
    full, low = settings["full"], settings[4]
    assert full.agreement.value == 1.0
    assert abs(full.increase.value) < CLOSE
    assert low.agreement.value < 0.5
    assert low.divergence.value > 0.1


def test_a_matrix_is_decomposed_once(
    deep: Deep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    stock = FUNCTIONS["residual"]

    def counted(args: Any, params: Any, seed: int) -> Any:
        calls.append(params)
        return stock(args, params, seed)

    monkeypatch.setitem(FUNCTIONS, "residual", counted)
    made = shared(deep("llama"), tmp_path / "out", rank=4, verify=False)
    assert len(calls) == BLOCKS * LINEARS
    # in many files as well
    split = shared(deep("llama"), tmp_path / "split", rank=4, verify=False, max_shard_size="8kB")
    assert len(list(split.glob("*.safetensors"))) > BLOCKS
    assert len(calls) == 2 * BLOCKS * LINEARS
    whole, parts = tensors_of(made), tensors_of(split)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(("family", "rank"), [("llama", 4), ("gpt2", 0)])
def test_the_card_counts_each_parameter_once(
    family: str, rank: int, deep: Deep, tmp_path: Path
) -> None:
    made = shared(deep(family), tmp_path / "out", rank=rank)
    card = " ".join((made / "README.md").read_text().split())
    stored = tensors_of(made)
    count = sum(tensor.numel() for tensor in stored.values())
    assert count == sum(parameter.numel() for parameter in load_model(made).parameters())
    residuals = sum(tensor.numel() for name, tensor in stored.items() if ".residual." in name)
    dense = sum(tensor.numel() for tensor in tensors_of(deep(family)).values())
    assert f"It has {count:,} parameters, each counted once" in card
    assert f"{residuals:,} of residuals included" in card
    assert f"no residuals there would be {dense:,}" in card
    assert "with blocks that share matrices. Made by adaconvert" in card
    beside = f"residuals of rank {rank}" if rank else "no residuals"
    assert f"Blocks share matrices (0 and 3; 1 and 4; 2 and 5), with {beside}." in card


def test_a_tuned_one_counts_them_still(deep: Deep, tmp_path: Path) -> None:
    made = shared(deep("llama"), tmp_path / "out", rank=4)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and slept. " * 100)
    given = {"steps": 1, "seq_len": 32, "batch_size": 2, "save_every": 0}
    api.finetune(made, tmp_path / "tuned", data=[str(text)], **given)
    cards = [(folder / "README.md").read_text() for folder in (made, tmp_path / "tuned")]
    lines = [[line for line in card.splitlines() if "each counted once" in line] for card in cards]
    assert len(lines[0]) == 1
    assert lines[0] == lines[1]


def test_nothing_shared_is_not_told(deep: Deep, tmp_path: Path) -> None:
    made = shared(deep("llama"), tmp_path / "out", loops=1)
    card = (made / "README.md").read_text()
    assert "Blocks that share matrices" not in card
    assert json.loads((made / "config.json").read_text())["adaptive"]["model"]["recursion"]


@pytest.mark.parametrize("asked", [{"lora": 4}, {"sparsity": 0.01}, {"activation": "relu"}])
def test_what_needs_matrices_of_every_depth_is_refused(
    asked: dict[str, Any], deep: Deep, tmp_path: Path
) -> None:
    made = shared(deep("llama-tied"), tmp_path / "made", rank=4)
    text = tmp_path / "text.txt"
    text.write_text("a text to learn from. " * 50)
    with pytest.raises(OptionError, match="several blocks share"):
        api.finetune(made, tmp_path / "tuned", data=[str(text)], steps=1, seq_len=16, **asked)
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("standalone", [True, False])
def test_adapters_beside_shared_matrices_are_told(
    standalone: bool, deep: Deep, tmp_path: Path
) -> None:
    made = shared(deep("llama-tied"), tmp_path / "made", rank=4)
    api.convert(made, destination=tmp_path / "out", method="molora", standalone=standalone)
    told = json.loads((tmp_path / "out/adaconvert.json").read_text())["notes"]
    assert any("the first of these depths alone" in note for note in told)
