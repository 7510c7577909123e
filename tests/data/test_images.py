"""Images read, labelled and turned into pixel values, against Pillow and numpy by hand."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from adaconvert.data.images import image_blocks, load_processor, read_images
from adaconvert.errors import AdaconvertError, DataError, OptionError, ResourceError
from adaconvert.testing import tiny_models
from adaconvert.testing.tiny_images import save_image, save_images

NAMES = ("cat", "dog", "owl")
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("vit", tmp_path_factory.mktemp("images") / "vit", **LABELS)


@pytest.fixture(scope="module")
def config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder)


def by_hand(path: Path) -> numpy.ndarray[Any, Any]:
    image = Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    return (numpy.asarray(image, dtype="float64") / 255 - 0.5).transpose(2, 0, 1) / 0.5


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_of_classes_by_turns(folder: Path, config: Any, tmp_path: Path) -> None:
    root = save_images(tmp_path / "pets", ("owl", "cat"), 2)
    save_image(root / "owl" / "more" / "x.jpeg", random.Random(1))
    (root / "owl" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    data = read_images(root, folder, config, label_field="label")
    assert data.names == (
        "cat/000.png",
        "owl/000.png",
        "cat/001.png",
        "owl/001.png",
        *data.names[4:],
    )
    assert data.names[4:] == ("owl/more/x.jpeg",)
    assert data.labels == (0, 2, 0, 2, 2)
    few = read_images(root, folder, config, label_field="label", max_documents=2)
    assert few.labels == (0, 2)
    pixels = data.pixels([1, 0])
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.dtype == torch.float32
    for row, name in enumerate((data.names[1], data.names[0])):
        assert numpy.abs(pixels[row].numpy() - by_hand(root / name)).max() < 1e-6


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        pytest.param(("n01", "n02", "n03"), (0, 1, 2), id="as-many-in-sorted-order"),
        pytest.param(("2", "1"), (1, 2), id="numbers"),
        pytest.param(("dog",), (1,), id="one-by-name"),
    ],
)
def test_what_folders_may_be_called(
    folder: Path, config: Any, tmp_path: Path, classes: tuple[str, ...], labels: tuple[int, ...]
) -> None:
    root = save_images(tmp_path / "split" / "valid", classes, 1)
    assert read_images(root, folder, config, label_field="label").labels == labels
    parted = read_images(root.parent, folder, config, label_field="label", split="valid")
    assert parted.labels == labels
    # without labels any folder will do, and so will images beside it
    save_image(root / "beside.png", random.Random(2))
    assert len(read_images(root, folder, config)) == 1 + len(classes)


def test_rows_name_images_beside_their_file(folder: Path, config: Any, tmp_path: Path) -> None:
    save_images(tmp_path / "all", ("a", "b"), 1)
    rows = [{"image": "all/a/000.png", "label": "owl"}, {"image": "all/b/000.png", "label": 1}]
    listed = written(tmp_path / "list.jsonl", rows)
    data = read_images(listed, folder, config, label_field="label")
    assert (data.names, data.labels) == (("list.jsonl:1", "list.jsonl:2"), (2, 1))
    table = tmp_path / "list.csv"
    table.write_text("kind,path\nowl,all/a/000.png\n1,all/b/000.png\n")
    fields = {"field": "path", "label_field": "kind"}
    same = read_images(table, folder, config, **fields)
    assert (same.names, same.labels) == (("list.csv:2", "list.csv:3"), (2, 1))
    assert same.digest == data.digest
    assert torch.equal(same.pixels([0, 1]), data.pixels([0, 1]))
    both = read_images([str(listed), str(listed)], folder, config)
    assert len(both) == 4
    assert both.unique().names == data.names


def test_every_kind_of_colour_and_the_right_way_up(
    folder: Path, config: Any, tmp_path: Path
) -> None:
    plain = Image.open(save_image(tmp_path / "in" / "a.png", random.Random(3)))
    plain.convert("L").save(tmp_path / "in" / "b.png")
    plain.convert("P").save(tmp_path / "in" / "c.png")
    plain.convert("RGBA").save(tmp_path / "in" / "d.png")
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it as it was
    turned.save(tmp_path / "in" / "e.png", exif=exif)
    data = read_images(tmp_path / "in", folder, config)
    pixels = data.pixels(range(5))
    assert bool(pixels.isfinite().all())
    assert torch.equal(pixels[3], pixels[0])
    assert torch.equal(pixels[4], pixels[0])


def test_images_are_opened_when_they_are_needed(folder: Path, config: Any, tmp_path: Path) -> None:
    root = save_images(tmp_path / "in", NAMES, 2)
    data = read_images(root, folder, config)
    (root / "owl" / "001.png").write_bytes(b"\x89PNG, but not really")
    assert data.batches(4) == [[0, 1, 2, 3], [4, 5]]
    data.pixels([0, 1, 2, 3])
    message = (
        r"^owl/001\.png: cannot be read as an image; expected one of BMP.*, found .* in 001\.png"
    )
    with pytest.raises(DataError, match=message):
        data.pixels([4, 5])


def test_blocks_are_images_in_a_seeded_order(folder: Path, config: Any, tmp_path: Path) -> None:
    data = read_images(save_images(tmp_path / "in", NAMES, 4), folder, config)
    whole = image_blocks(data)
    assert (len(whole), whole.length, whole.tokens) == (12, 5, 60)
    assert whole.document.tolist() == list(range(12))
    some = image_blocks(data, max_tokens=24, seed=1)
    assert len(some) == 4
    assert some.digest == image_blocks(data, max_tokens=24, seed=1).digest
    assert some.digest != image_blocks(data, max_tokens=24, seed=2).digest
    assert torch.equal(some.pixels([2]), data.pixels([int(some.document[2])]))


def refused(kind: type[AdaconvertError], message: str, *args: Any, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        read_images(*args, **{"label_field": "label", **options})


def test_bad_data(folder: Path, config: Any, tmp_path: Path) -> None:
    model = (folder, config)
    refused(DataError, r"there is no such file or folder.*a hub data set", "org/name", *model)
    (tmp_path / "none" / "cat").mkdir(parents=True)
    refused(DataError, r"none: holds no image; expected a folder", tmp_path / "none", *model)
    one = save_images(tmp_path / "one", ("cat", "rat"), 1)
    refused(DataError, r"folder 'rat': is no label of the model; expected 0 to 2, or", one, *model)
    two = save_images(tmp_path / "two", ("x", "y"), 1)
    refused(
        DataError, r"two: the folders are not the classes.*cat, dog.*found 2: x, y", two, *model
    )
    far = save_images(tmp_path / "far", ("1", "7"), 1)
    refused(DataError, r"folder '7': is no label .* found 7", far, *model)
    refused(DataError, r"no folder of split '\.\.'; found cat, rat", one, *model, split="..")
    bad = written(tmp_path / "bad.jsonl", [{"image": "one/cat/000.png", "label": "rat"}])
    refused(DataError, r"bad\.jsonl:1 field 'label': is no label .* found rat", bad, *model)
    refused(
        DataError, r"bad\.jsonl line 1: there is no field 'picture'", bad, *model, field="picture"
    )
    lost = written(tmp_path / "lost.jsonl", [{"image": "one/no.png", "label": 0}])
    refused(DataError, r"lost\.jsonl:1 .*not there.* found 'one/no\.png'", lost, *model)
    odd = written(tmp_path / "odd.jsonl", [{"image": 3, "label": 0}])
    refused(DataError, r"is no path of an image; expected a string, found", odd, *model)
    table = tmp_path / "bad.csv"
    table.write_bytes(b"image,label\n\xff,0\n")
    refused(DataError, r"bad\.csv: is not UTF-8 text", table, *model)
    table.write_text("picture\nx\n")
    refused(
        DataError, r"bad\.csv: there is no field 'image'; found fields 'picture'", table, *model
    )


def test_bad_checkpoints(
    folder: Path, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = save_images(tmp_path / "in", NAMES, 1)
    (tmp_path / "empty").mkdir()
    message = r"empty: the checkpoint has no image processor; expected one of preprocessor_config"
    refused(DataError, message, root, tmp_path / "empty", config)
    (tmp_path / "empty" / "preprocessor_config.json").write_text("[")
    refused(DataError, "the image processor cannot be loaded", root, tmp_path / "empty", config)
    bert = AutoConfig.for_model("bert", num_labels=3)
    refused(OptionError, "not run on images; expected vit, found bert", root, folder, bert)
    several = AutoConfig.for_model("vit", problem_type="multi_label_classification")
    refused(OptionError, "one label an image; found multi_label", root, folder, several)
    larger = AutoConfig.for_model("vit", image_size=32, patch_size=8, **LABELS)
    with pytest.raises(DataError, match=r"pixel values of 3 x 32 x 32, found 3 x 16 x 16"):
        read_images(root, folder, larger).pixels([0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(DataError, match=r"cannot be read as an image.*DecompressionBomb"):
        read_images(root, folder, config).pixels([0])


def test_without_pillow(folder: Path, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = r'package Pillow: not installed.*pip install "adaconvert\[images\]"'
    with pytest.raises(ResourceError, match=message):
        load_processor(folder, config)
