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


def measured(out: Path, source: Path, text: Path, tokens: int) -> tuple[int, int, float, bool]:
    """Return the tokens that set the biases of a checkpoint and those they are measured on, what it
    spends on the latter, mean over blocks, and whether those set nothing."""
    from adaconvert.data.text import read_documents
    from adaconvert.data.tokens import token_blocks

    blocks = token_blocks(
        read_documents(text), source, length=fit.LENGTH, max_tokens=tokens, spread=True
    )
    first, start = fit.parts_of(blocks)
    model: Any = load_model(out)
    with torch.no_grad(), model.account() as account:
        for inputs in fit.batches(blocks, start, len(blocks)):
            model(**inputs)
    uses = [int(site.experts.sum()) / (2 * site.tokens) for site in account.sites.values()]
    seen = int(blocks.weights[start:].sum())
    assert {site.tokens for site in account.sites.values()} == {seen}
    return int(blocks.weights[:first].sum()), seen, sum(uses) / len(uses), start > 0


def test_what_is_reported_is_what_the_checkpoint_spends(
    convert: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    out, result = convert("mixtral", target_compute=0.7)
    found = measured(out, tmp_path / "mixtral", tmp_path / "text0.jsonl", 24_000)
    used, seen, share, apart = found
    assert apart
    assert 0 < seen <= (used + seen) / 8
    (sentence,) = result.found
    assert f"give {share:.3f} of the source's real experts per token" in sentence
    assert f"on {seen:,} tokens of it kept out of the setting, wanted 0.700" in sentence
    assert "only" not in sentence


def test_a_text_of_one_batch_reports_what_its_biases_give(
    convert: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    out, result = convert("mixtral", target_compute=0.7, data_tokens=400)
    used, seen, share, apart = measured(out, tmp_path / "mixtral", tmp_path / "text0.jsonl", 400)
    assert used == seen <= 400
    assert not apart
    assert abs(share - 0.7) <= 0.1
    (sentence,) = result.found
    assert f"give {share:.3f} of" in sentence
    assert f"on {seen:,} tokens they were set on, wanted 0.700; only {used:,} tokens" in sentence
    assert sentence.endswith("so other text may spend other shares: give 4,096 or more")


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


def test_a_plan_states_the_memory_of_the_run_on_text(tmp_path: Path) -> None:
    source = make("mixtral", tmp_path / "mixtral", max_shard_size="1GB")
    text = str(text_file(tmp_path, 0))
    report = adaconvert.plan(source, method="adamoe", target_compute=0.7, data=text)
    assert any("loads the whole mixture in float32" in note for note in report.notes)
    assert (
        report.counted == "2 blocks at 1.4 real experts, its target of 0.7, if its biases hold it"
    )


def test_a_missing_text_is_named_before_anything_is_written(
    convert: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        convert("mixtral", target_compute=0.7, data=str(tmp_path / "none.jsonl"))
    assert not (tmp_path / "out").exists()
