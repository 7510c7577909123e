"""`--target-compute` on text: the bias of every block is set so that it spends its share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaconvert
from adaconvert.errors import DataError, ResourceError
from adaconvert.methods.adamoe import fit
from adaconvert.modeling.loading import load_model
from adaconvert.testing.tiny_models import make

SENTENCE = "one two three while rain falls on old towns 12 hills and 7 rivers near the sea"


def text_file(folder: Path, seed: int) -> Path:
    drawn, words = random.Random(seed), SENTENCE.split()
    rows = [" ".join(drawn.choice(words) for _ in range(40)) for _ in range(150)]
    file = folder / f"text{seed}.jsonl"
    file.write_text("\n".join(json.dumps({"text": row}) for row in rows) + "\n")
    return file


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    def made(name: str, **options: Any) -> tuple[Path, Any]:
        source, out = tmp_path / name, tmp_path / "out"
        if not source.exists():
            make(name, source, max_shard_size="1GB")
        given = {"data": str(text_file(tmp_path, 0)), "data_tokens": 24_000, **options}
        return out, adaconvert.convert(source, destination=out, method="adamoe", **given)

    return made


def shares(folder: Path, text: Path, top_k: int) -> list[float]:
    """Return real experts per token over k on the tokens of a text, block by block."""
    from adaconvert.data.text import read_documents
    from adaconvert.data.tokens import token_blocks

    blocks = token_blocks(read_documents(text), folder, length=128)
    model: Any = load_model(folder)
    with torch.no_grad(), model.collect("experts_run") as run:
        model(
            input_ids=torch.from_numpy(blocks.ids),
            attention_mask=torch.from_numpy(blocks.weights).long(),
        )
    return [float(torch.cat(found).double().mean()) / top_k for found in run.values()]


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("mixtral", {"target_compute": 0.7}, [0.7, 0.7]),
        ("olmoe", {"target_compute": 0.5, "null_init": "bias"}, [0.5, 0.5]),
        ("qwen2_moe", {"layer_budget": "0=0.9,1=0.6", "min_real": 1}, [0.9, 0.6]),
        ("granitemoe", {"target_compute": 1.3, "null_weights": "selected"}, [1.3, 1.3]),
    ],
)
def test_unseen_text_spends_the_share(
    name: str,
    options: dict[str, Any],
    wanted: list[float],
    convert: Callable[..., tuple[Path, Any]],
    tmp_path: Path,
) -> None:
    out, result = convert(name, **options)
    found = shares(out, text_file(tmp_path, 1), top_k=2)
    assert [abs(share - goal) <= 0.02 for share, goal in zip(found, wanted, strict=True)] == [
        True,
        True,
    ], found
    (sentence,) = result.found
    assert sentence.startswith("null biases set on the text give")
    record = json.loads((out / "adaconvert.json").read_text())
    assert sentence in record["notes"]
    assert record["exactness"]["kind"] == "approximate"
    realised = record["verification"]["configured"]["real_experts"]
    assert 0 < realised < 2 * max(wanted) + 0.5


def test_blocks_without_a_budget_keep_their_start(
    convert: Callable[..., tuple[Path, Any]],
) -> None:
    out, _ = convert("mixtral", layer_budget="1=0.6")
    model: Any = load_model(out)
    biases = [site.null_experts.bias.item() for site in model.adaptive_sites().values()]
    assert biases[0] == 0.0
    assert biases[1] > 0.0


def test_the_same_text_gives_the_same_bytes(
    convert: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    out, _ = convert("mixtral", target_compute=0.7)
    first = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    again, _ = convert("mixtral", target_compute=0.7, overwrite=True)
    assert {file.name: file.read_bytes() for file in again.glob("*.safetensors")} == first
    # verified later, with the plan from the manifest and without the text
    assert adaconvert.verify(tmp_path / "mixtral", out).ok


def test_an_upcycled_model_stays_dense_at_any_budget(
    convert: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    out, result = convert("llama", target_compute=0.6, experts=4)
    assert result.report.exactness.kind == "exact"
    (first, second) = shares(out, text_file(tmp_path, 1), top_k=2)
    assert abs(first - 0.6) <= 0.02
    assert abs(second - 0.6) <= 0.02


def test_a_model_that_does_not_fit_is_refused(
    convert: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fit, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="the mixture has to be loaded to set its biases"):
        convert("mixtral", target_compute=0.7)
    assert not (tmp_path / "out").exists()


def test_a_missing_text_is_named_before_anything_is_written(
    convert: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        convert("mixtral", target_compute=0.7, data=str(tmp_path / "none.jsonl"))
    assert not (tmp_path / "out").exists()
