"""`evaluate` end to end: dense, Mixture-of-Experts and adaptive checkpoints, and refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.api import evaluate
from adaconvert.data.text import read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.errors import DataError, OptionError, OutputConflictError, SourceError
from adaconvert.evaluate.report import NOISE, Evaluation
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive

TEXTS = ["The converter reads a folder. " * 5, "Every tensor is used once. " * 3, "A b c d e f."]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_models.make("llama", folder / "dense")
    make_adaptive(folder / "dense", folder / "adaptive")
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "data.jsonl").write_text("\n".join(rows))
    return folder


def test_adaptive_checkpoint_against_its_source(root: Path) -> None:
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (root / "adaptive").iterdir())
    report = evaluate(
        root / "adaptive",
        data=root / "data.jsonl",
        reference=root / "dense",
        length=32,
        set_compute=(1, 0.7),
        select=("rule=top-k,k=2",),
    )
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (root / "adaptive").iterdir()) == before
    full, less, two = report.results
    assert report.reference is not None
    # every expert on is the dense model, bit for bit
    assert full.loss == report.reference.loss
    assert full.increase is not None
    assert (full.increase.value, full.agreement, full.divergence) == (
        0.0,
        type(full.increase)(value=1.0, error=0.0),
        type(full.increase)(value=0.0, error=0.0),
    )
    assert full.compute is not None
    assert less.compute is not None
    assert two.compute is not None
    assert full.compute.fraction == 1.0
    assert report.reference.compute is not None
    # counted pass by pass and estimated from shapes: means of the same whole numbers
    assert full.compute.flops == pytest.approx(report.reference.compute.flops, rel=1e-12)
    assert full.compute.weight_bytes == report.reference.compute.weight_bytes
    assert 0.6 < float(less.compute.fraction or 0) <= 0.7
    assert float(two.compute.fraction or 0) < float(less.compute.fraction or 0)
    assert [usage.active for usage in two.usage] == [2.0, 2.0]
    assert two.agreement is not None
    assert 0 < two.agreement.value < 1
    assert all(result.speed is not None for result in report.results)


def test_loss_is_the_mean_over_all_tokens(root: Path) -> None:
    report = evaluate(root / "dense", data=root / "data.jsonl", length=32, speed=False)
    model = load_model(root / "dense")
    blocks = token_blocks(read_documents(root / "data.jsonl"), root / "dense", length=32)
    total = tokens = 0.0
    for ids, weights in zip(blocks.ids, blocks.weights, strict=True):
        kept = torch.from_numpy(ids[weights])[None]
        with torch.no_grad():
            total += float(model(input_ids=kept, labels=kept).loss) * (kept.shape[1] - 1)
        tokens += kept.shape[1] - 1
    (result,) = report.results
    assert result.loss is not None
    # float32 means of a block against float64 sums
    assert result.loss.value == pytest.approx(total / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert sum(d.tokens for d in result.documents) == tokens
    assert {d.name for d in result.documents} == {f"data.jsonl:{i}" for i in (1, 2, 3)}
    assert result.speed is None


def test_documents_are_paired_with_the_reference(root: Path, tmp_path: Path) -> None:
    other = tiny_models.make("llama", tmp_path / "other", seed=5)
    report = evaluate(
        root / "dense", data=root / "data.jsonl", reference=other, length=32, speed=False
    )
    (result,) = report.results
    assert report.reference is not None
    pairs = list(zip(result.documents, report.reference.documents, strict=True))
    assert all(own.name == base.name and own.tokens == base.tokens for own, base in pairs)
    tokens = sum(own.tokens for own, _ in pairs)
    expected = sum(own.loss - base.loss for own, base in pairs) / tokens
    assert result.increase is not None
    assert result.increase.value == pytest.approx(expected, rel=1e-12)
    assert result.compute is not None
    assert result.compute.fraction == 1.0


def test_mixture_of_experts(root: Path, tmp_path: Path) -> None:
    made = tiny_models.make("mixtral", tmp_path / "moe")
    report = evaluate(made, data=root / "data.jsonl", length=32, reference=root / "dense")
    (result,) = report.results
    assert result.compute is not None
    assert not result.compute.counted
    # two of four experts of the dense width, and a router
    assert 1 < float(result.compute.fraction or 0) < 2
    assert result.usage == ()


def test_dtype_and_max_tokens(root: Path) -> None:
    report = evaluate(
        root / "dense", data=root / "data.jsonl", dtype="bfloat16", max_tokens=40, speed=False
    )
    assert report.runtime == {"dtype": "bfloat16", "device": "cpu", "threads": 1}
    assert report.data["tokens"] == 40
    (result,) = report.results
    full = evaluate(root / "dense", data=root / "data.jsonl", speed=False).results[0]
    assert result.compute is not None
    assert full.compute is not None
    assert result.compute.weight_bytes == full.compute.weight_bytes / 2


def labelled(path: Path) -> Path:
    rows = [json.dumps({"text": text, "label": i}) for i, text in enumerate(TEXTS)]
    path.write_text("\n".join(rows))
    return path


def test_classifier(tmp_path: Path) -> None:
    dense = tiny_models.make(
        "bert", tmp_path / "d", architecture="BertForSequenceClassification", num_labels=3
    )
    adaptive = make_adaptive(dense, tmp_path / "a")
    data = labelled(tmp_path / "data.jsonl")
    report = evaluate(adaptive, data=data, reference=dense, set_compute=1)
    (result,) = report.results
    assert report.reference is not None
    assert report.kind == "classifier"
    assert result.accuracy == report.reference.accuracy
    assert result.accuracy is not None
    assert result.accuracy.value in (0, 1 / 3, 2 / 3, 1)
    assert result.agreement is not None
    assert result.agreement.value == 1.0
    assert result.perplexity is None
    assert result.compute is not None
    assert result.compute.counted
    assert result.speed is not None
    assert result.speed.decode is None
    assert any(line.startswith("setting") and "accuracy" in line for line in report.lines())


def test_report_is_json_and_text(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    report = evaluate(
        root / "adaptive",
        data=root / "data.jsonl",
        length=32,
        out=out,
        select="rule=dynamic-k,tau=0.9",
    )
    written = json.loads(out.read_text())
    assert written == json.loads(json.dumps(report.to_json(), allow_nan=False))
    (setting,) = written["settings"]
    assert setting["set_select"] == {"rule": "dynamic-k", "tau": 0.9}
    assert setting["compute"]["counted"] is True
    assert len(setting["experts"]) == 2
    assert len(setting["documents"]) == 3
    assert written["reference"] is None
    lines = report.lines()
    assert lines[0] == "adaptive: AdaptiveLlamaForCausalLM, dtype float32, device cpu, threads 1"
    assert lines[-1] == f"note: {NOISE}"
    assert any(line.startswith("  model.layers.1.mlp: ") for line in lines)
    assert str(root) not in "\n".join(lines) + out.read_text()


def test_every_expert_is_said_in_one_line(root: Path) -> None:
    report = evaluate(root / "adaptive", data=root / "data.jsonl", speed=False)
    assert report.lines()[-1] == "  2 sites ran every expert for every token"


def test_output_is_checked_before_anything_is_loaded(root: Path, tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("mine")
    with pytest.raises(OutputConflictError, match=r"there\.json: exists\. Name a new file"):
        evaluate("no/such/checkpoint", data="none", out=tmp_path / "there.json")
    assert (tmp_path / "there.json").read_text() == "mine"


def refused(error: type[Exception], message: str, where: Path, **options: Any) -> None:
    with pytest.raises(error, match=message):
        evaluate(where, speed=False, **options)


def test_bad_input(root: Path, tmp_path: Path) -> None:
    data = root / "data.jsonl"
    refused(OptionError, "there is nothing to measure on", root / "dense")
    refused(SourceError, "no such folder", root / "none" / "at all", data=data)
    refused(DataError, r"no such file or folder", root / "dense", data=root / "none.jsonl")
    refused(OptionError, "has no compute knob", root / "dense", data=data, set_compute=0.5)
    refused(OptionError, "is out of reach", root / "adaptive", data=data, set_compute=0.1)
    refused(OptionError, "has no known rule", root / "adaptive", data=data, select="rule=x")
    masked = tiny_models.make("bert", tmp_path / "bert")
    refused(OptionError, "of this kind are not measured; .* found BertForM", masked, data=data)
    image = tiny_models.make("vit", tmp_path / "vit")
    refused(DataError, "data.jsonl line 1: there is no field 'image'", image, data=data)
    refused(
        OptionError,
        "--reference: is another kind",
        root / "dense",
        data=data,
        reference=classifier(tmp_path),
    )


def classifier(root: Path) -> Path:
    return tiny_models.make(
        "bert", root / "c", architecture="BertForSequenceClassification", num_labels=2
    )


def test_reference_that_cuts_text_differently(root: Path, tmp_path: Path) -> None:
    other = tiny_models.make("llama", tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:3]
    path.write_text(json.dumps(tokenizer))
    refused(
        OptionError,
        "--reference: cuts the text into other tokens",
        root / "dense",
        data=root / "data.jsonl",
        reference=other,
    )


def test_reference_whose_tokenizer_pads_otherwise(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(root / "dense", other)
    path = other / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    assert settings["pad_token"] != settings["eos_token"]
    path.write_text(json.dumps({**settings, "pad_token": settings["eos_token"]}))
    report = evaluate(
        root / "dense", data=root / "data.jsonl", reference=other, length=32, speed=False
    )
    assert report.results[0].increase is not None
    assert report.results[0].increase.value == 0


def test_other_number_of_classes(tmp_path: Path) -> None:
    two = classifier(tmp_path)
    three = tiny_models.make(
        "bert", tmp_path / "t", architecture="BertForSequenceClassification", num_labels=3
    )
    data = labelled(tmp_path / "data.jsonl")
    refused(OptionError, "has another number of classes", three, data=data, reference=two)


def test_nan_in_the_weights_names_document_and_checkpoint(root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made = tiny_models.make("llama", tmp_path / "nan", max_shard_size="1GB")
    weights = load_file(made / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    refused(
        SourceError,
        r"as stored: the model computes NaN; found first in document data\.jsonl:\d",
        made,
        data=root / "data.jsonl",
    )


def test_out_of_memory_says_what_helps(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaconvert.errors import ResourceError
    from adaconvert.evaluate import measures

    def fail(*args: object, **kwargs: object) -> Evaluation:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(measures, "score_texts", fail)
    refused(
        ResourceError, "out of memory. Lower --batch-size", root / "dense", data=root / "data.jsonl"
    )
