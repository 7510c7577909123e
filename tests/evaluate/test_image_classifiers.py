"""A tiny ViT from images to numbers: `d2dmoe`, `inspect --activations`, `evaluate`, `calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from adaconvert import api
from adaconvert.errors import DataError, OptionError
from adaconvert.evaluate.report import Evaluation
from adaconvert.testing import tiny_models
from adaconvert.testing.tiny_images import save_images

CLASSES = ("LABEL_0", "LABEL_1", "LABEL_2")
FITTED = {"num_experts": 8, "router_width": 32, "router_steps": 200, "router_batch": 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a dense ViT, images, and what `d2dmoe` made of both."""
    root = tmp_path_factory.mktemp("vit")
    tiny_models.make("vit", root / "dense")
    save_images(root / "images", CLASSES, 24)
    api.d2dmoe(root / "dense", root / "split", data=str(root / "images"), tau=0.2, **FITTED)
    return root


def evaluate(root: Path, name: str, **options: Any) -> Evaluation:
    return api.evaluate(root / name, data=root / "images", speed=False, **options)


def test_accuracy_and_loss_one_image_at_a_time(root: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(root / "dense")
    processor = AutoImageProcessor.from_pretrained(root / "dense", backend="pil")
    right, losses = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((root / "images" / name).iterdir()):
            given = processor(images=Image.open(path), return_tensors="pt")
            with torch.no_grad():
                logits = model(**given).logits[0]
            right.append(int(logits.argmax()) == label)
            losses.append(-float(logits.log_softmax(-1)[label]))
    found = evaluate(root, "dense", batch_size=7)
    assert found.kind == "image classifier"
    assert found.data == {"name": "images", "documents": 72, "tokens": 360}
    (result,) = found.results
    assert result.accuracy is not None
    assert result.loss is not None
    assert result.accuracy.value == pytest.approx(sum(right) / 72)
    assert result.loss.value == pytest.approx(sum(losses) / 72, abs=1e-6)
    assert result.perplexity is None


def test_settings_are_compared_with_the_dense_model(root: Path) -> None:
    found = evaluate(root, "split", reference=root / "dense", select=["rule=all", "rule=top-k,k=1"])
    whole, one = found.results
    assert found.reference is not None
    assert whole.agreement is not None
    assert whole.agreement.value == 1
    assert whole.increase is not None
    assert abs(whole.increase.value) < 1e-6
    assert whole.compute is not None
    assert one.compute is not None
    assert one.compute.ffn_flops < whole.compute.ffn_flops
    assert [usage.active for usage in one.usage] == [1, 1]


def test_speed_is_that_of_one_image(root: Path) -> None:
    (result,) = api.evaluate(root / "split", data=root / "images", max_documents=3).results
    assert result.speed is not None
    assert (result.speed.prefill_tokens, result.speed.decode) == (5, None)


def test_calibrated_for_images_whose_class_changes(root: Path, tmp_path: Path) -> None:
    report = api.calibrate(
        root / "split", root / "images", destination=tmp_path / "out", max_disagreement=0.4
    )
    assert report.split["blocks"] == 72
    assert report.chosen is not None
    assert report.rows[report.chosen].changed <= 0.4
    table = json.loads((tmp_path / "out" / "config.json").read_text())["adaptive"]["calibration"]
    assert table
    with pytest.raises(OptionError, match="Use --max-disagreement, the share of texts or images"):
        api.calibrate(root / "split", root / "images", max_loss_increase=0.1)


def test_routers_are_good_and_activations_measured(root: Path) -> None:
    config = json.loads((root / "split" / "config.json").read_text())
    for site in config["adaptive"]["sites"].values():
        quality = site["ffn"]["router"]["quality"]
        # a choice that learned nothing would keep no more than the same experts for every token
        assert quality["captured"]["E/2"] > quality["constant"]["E/2"]
    dense, split = (
        api.inspect_activations(root / name, root / "images", max_tokens=100)
        for name in ("dense", "split")
    )
    assert (dense.tokens, len(dense.layers)) == (100, 2)
    assert split.mean.hoyer == pytest.approx(dense.mean.hoyer, abs=1e-6)


def test_kept_layers_and_a_second_router(root: Path, tmp_path: Path) -> None:
    options = {"data": str(root / "images"), "verify": False, **FITTED}
    work = {"work": str(tmp_path / "work")}
    api.d2dmoe(root / "dense", tmp_path / "a", tau=0.2, **options, **work)
    # every layer is kept, so this one fits nothing
    api.d2dmoe(root / "dense", tmp_path / "b", tau=0.2, **{**options, **work})
    for name in ("a", "b"):
        for shard in (root / "split").glob("*.safetensors"):
            assert (tmp_path / name / shard.name).read_bytes() == shard.read_bytes()
    rest = {key: value for key, value in options.items() if key != "num_experts"}
    api.d2dmoe(root / "split", tmp_path / "c", stages="3,4", tau=0.5, **rest)
    (found,) = api.evaluate(tmp_path / "c", data=root / "images", speed=False).results
    assert found.compute is not None
    assert [usage.experts for usage in found.usage] == [8, 8]


def test_what_does_not_fit(root: Path, tmp_path: Path) -> None:
    few = save_images(tmp_path / "few", CLASSES, 2)
    with pytest.raises(
        DataError, match=r"too little text to fit routers on.* found 30\. Give more"
    ):
        api.d2dmoe(root / "dense", tmp_path / "out", data=str(few), **FITTED)
    with pytest.raises(OptionError, match="projections cannot be run layer by layer"):
        api.d2dmoe(root / "dense", tmp_path / "out", data=str(few), stages="2,3,4,5", **FITTED)
    tiny_models.make("vit", tmp_path / "other", image_size=24)
    with pytest.raises(OptionError, match="--reference: makes other pixel values of images"):
        evaluate(root, "dense", reference=tmp_path / "other")
    assert not (tmp_path / "out").exists()
