"""What a card tells of null experts: how they came in, what tokens run, and the figure of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from adaconvert import api
from adaconvert.export.card import render
from adaconvert.export.card_classes import classes_of
from adaconvert.export.card_classes_plot import plot_classes
from adaconvert.export.card_stages import ROUTING
from adaconvert.export.card_text import percent
from adaconvert.io import aux_files, manifest
from adaconvert.io.card_file import CARD, CLASSES_PLOT, PLOT
from adaconvert.methods.sources import left_behind, open_source
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.calibrating import assert_whole
from adaconvert.testing.calls import call
from adaconvert.testing.null_by_hand import make_nulled
from adaconvert.testing.writing import tree_digest
from adaconvert.train.routing_config import ROUTING_OPTIONS, Routing
from adaconvert.units import human_count

SVG = "{http://www.w3.org/2000/svg}"
Content = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def nulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a mixture with null experts that some tokens choose."""
    root = tmp_path_factory.mktemp("null-card")

    def spend(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("null_experts.bias"):
                tensors[name].fill_(0.4)

    stock = tiny_models.make("mixtral", root / "stock")
    return make_nulled(stock, root / "nulled", edit=spend)


@pytest.fixture(scope="module")
def measured(nulled: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a calibrated copy with kept results."""
    folder = tmp_path_factory.mktemp("measured") / "out"
    options = {"length": 32, "rules": ("null",), "values": (0.2, 0.6)}
    api.calibrate(nulled, text, destination=folder, **options)
    select = ("rule=null,bias=0.5", "rule=all")
    api.evaluate(folder, data=text, length=32, speed=False, record=True, select=select)
    return folder


def content(folder: Path) -> Content:
    record = json.loads((folder / manifest.MANIFEST_FILE).read_text())
    return record, json.loads((folder / "config.json").read_text())


def test_real_experts_by_class_are_told_and_drawn(measured: Path) -> None:
    text = (measured / CARD).read_text()
    assert f"]({CLASSES_PLOT})" in text
    assert "## Real experts by class of token" in text
    (entry,) = content(measured)[0]["quality"]
    found = entry["settings"][0]["token_classes"]
    assert {"function word", "punctuation", "number"} <= set(found["classes"])
    for name, real in zip(found["classes"], found["real"], strict=True):
        (line,) = [row for row in text.splitlines() if row.startswith(f"| {name} |")]
        assert f"| {real:.3f} |" in line
    # the first setting is told of
    assert "on `docs.jsonl`, null,bias=0.5." in text
    assert "% of 2 |" in text
    assert_whole(measured)


def test_the_figure_says_in_words_what_it_shows(measured: Path) -> None:
    drawn = ElementTree.fromstring((measured / CLASSES_PLOT).read_text())
    ids = str(drawn.get("aria-labelledby")).split()
    said = {child.get("id"): str(child.text) for child in drawn if child.get("id")}
    assert set(ids) == set(said)
    found = classes_of(content(measured)[0])
    assert found is not None
    for name, real in zip(found.names, found.real, strict=True):
        assert f"{name} {real:.3f}" in said["description"]
    texts = [child.text or "" for child in drawn.iter(f"{SVG}text")]
    assert {*found.names, "layer", "real experts per token", "all layers"} <= set(texts)
    assert len(list(drawn.iter(f"{SVG}polyline"))) == len(found.names)
    assert len(list(drawn.iter(f"{SVG}circle"))) == len(found.names) * len(found.layers)
    for shape in drawn.iter(f"{SVG}circle"):
        assert 400 <= float(str(shape.get("cx"))) <= 704
        assert 48 <= float(str(shape.get("cy"))) <= 336


def test_card_and_figure_are_made_again_byte_for_byte(measured: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / "copy"))
    before = tree_digest(folder)
    for name in (CARD, PLOT, CLASSES_PLOT):
        (folder / name).unlink()
    assert api.card(folder).written
    assert tree_digest(folder) == before
    assert not api.card(folder).written


def test_the_setting_at_which_classes_differ_is_drawn(measured: Path) -> None:
    record, _ = content(measured)
    settings = record["quality"][0]["settings"]
    found = classes_of(record)
    settings.reverse()
    assert settings[0]["label"] == "all"
    assert classes_of(record) == found
    del settings[1]
    found = classes_of(record)
    assert found is not None
    assert set(found.real) == {2.0}
    record["quality"] += [{"data": "x", "settings": None}, {"data": "y", "settings": [3]}]
    assert classes_of(record) == found


def test_the_figure_goes_with_what_was_measured(measured: Path, text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / "copy"))
    options = {"length": 32, "rules": ("top-k",), "values": (1,)}
    api.calibrate(folder, text, **options)
    assert not (folder / CLASSES_PLOT).exists()
    assert "Real experts by class" not in (folder / CARD).read_text()
    assert_whole(folder)


def test_the_figure_does_not_go_into_what_is_made_of_it(measured: Path) -> None:
    item = open_source(str(measured))
    assert aux_files.classify(item.source).dropped[CLASSES_PLOT] == "written anew"
    assert CLASSES_PLOT not in left_behind(item)


def test_an_edited_card_stays_and_the_figure_is_drawn(
    measured: Path, text: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / "copy"))
    (folder / CARD).write_text("mine\n")
    (folder / CLASSES_PLOT).write_bytes((folder / CLASSES_PLOT).read_bytes())
    api.evaluate(folder, data=text, length=16, speed=False, record=True)
    assert (folder / CARD).read_text() == "mine\n"
    assert b"real experts per token" in (folder / CLASSES_PLOT).read_bytes()


def test_the_knobs_are_those_of_null_experts(measured: Path) -> None:
    record, config = content(measured)
    text = render(record, config)
    assert "null experts, which cost nothing, compete for a token's slots" in text
    # what a bias does depends on those the checkpoint holds
    assert 'set_select("null"' not in text
    assert 'model.set_select("all")   # what the source decides, no null experts' in text
    assert 'with model.set_select("top-k", k=1):' in text
    assert "`model.set_compute(1.0)` runs what the source runs, without null experts." in text
    assert "at the target, if there is one, else as in the source." in text
    config["adaptive"]["calibration"] = None
    text = render(record, config)
    assert "after `adaconvert calibrate` it moves the null biases" in text
    assert 'set_select("null"' not in text
    assert "`adaconvert calibrate`, which gives the null biases of other budgets." in text
    assert "model.set_compute(0.9)" in text
    # whole experts of a model that is mostly something else
    config["adaptive"]["reference"]["flops_per_token"] *= 10
    assert "model.set_compute(0.97)" in render(record, config)
    config["adaptive"]["reference"] = None
    assert "model.set_compute" not in render(record, config)
    for slots in config["adaptive"]["sites"].values():
        slots["ffn"]["mixture"]["top_k"] = 1
    text = render(record, config)
    assert 'with model.set_select("all"):' in text
    assert "model.set_compute(0." not in text


def test_costs_say_what_the_calibrated_default_spends(measured: Path) -> None:
    record, config = content(measured)
    told = "The default that `adaconvert calibrate` chose is not in these numbers"
    assert told not in render(record, config)
    calibration = config["adaptive"]["calibration"]
    rows = calibration["rows"]
    calibration["chosen"] = 0
    share = percent(rows[0]["compute"])
    reference = config["adaptive"]["reference"]
    flops = human_count(round(rows[0]["compute"] * reference["flops_per_token"]))
    (line,) = [row for row in render(record, config).splitlines() if told in row]
    assert "bytes at batch 1. The default" in line
    assert f"it runs {share} of the reference's FLOPs per token, about {flops}" in line


def test_every_line_of_the_example_runs(measured: Path, nulled: Path) -> None:
    record = content(measured)[0]
    for folder in (measured, nulled):
        text = (
            render(record, config_of(folder)).split("## Running fewer experts")[1].split("```")[1]
        )
        model = load_model(folder)
        lines = text.splitlines()[1:]
        assert lines[-1] == "    model.generate(...)"
        for line in lines[:-1]:
            call(model, line.removeprefix("with ").split(":   #")[0])


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    "damage",
    [
        {"classes": ["a"] * 13},
        {"classes": "ab"},
        {"tokens": [0, 0]},
        {"tokens": [1]},
        {"real": [True, 1]},
        {"real": [-1, 1]},
        {"real": [float("inf"), 1]},
        {"layers": []},
        {"layers": [{"of": 2, "real": [1, 1]}]},
        {"layers": [{"site": "x", "of": 0, "real": [1, 1]}]},
        {"layers": {"site": "x"}},
        {"rare_at_most": None},
        {"none": None},
    ],
)
def test_damaged_numbers_are_left_out(damage: dict[str, Any], measured: Path) -> None:
    record, config = content(measured)
    good = {
        "classes": ["one", "two"],
        "tokens": [1, 2],
        "real": [1.0, 1.5],
        "none": [0.0, 0.1],
        "rare_at_most": 1,
        "layers": [{"site": "model.layers.3.mlp", "of": 2, "real": [1.0, 1.5]}],
    }
    row = {"label": "x", "token_classes": good}
    record["quality"] = [{"data": "text", "settings": [row]}]
    found = classes_of(record)
    assert found is not None
    assert found.layers[0].number == 3
    assert "| one | 33.3 % | 1.000 | 50 % | 0 % |" in render(record, config)
    row["token_classes"] = good | damage
    assert classes_of(record) is None
    assert "Real experts by class" not in render(record, config)


def test_layers_are_drawn_by_their_numbers(measured: Path) -> None:
    record, _ = content(measured)
    found = record["quality"][0]["settings"][0]["token_classes"]
    layer = found["layers"][0]
    found["layers"] = [{**layer, "site": f"model.layers.{n}.mlp"} for n in (0, 1, 10, 2)]
    told = classes_of(record)
    assert told is not None
    assert [one.number for one in told.layers] == [0, 1, 2, 10]
    drawn = ElementTree.fromstring(plot_classes(told))
    for line in drawn.iter(f"{SVG}polyline"):
        across = [float(point.split(",")[0]) for point in str(line.get("points")).split()]
        assert across == sorted(across)


def test_what_a_manifest_says_becomes_no_markup(measured: Path) -> None:
    record, config = content(measured)
    names = ["<script>x</script>", "a|b](c)", "\x00\ud800\n# d"]
    record["quality"] = [
        {
            "data": "`x`<b>",
            "settings": [
                {
                    "label": "[l](u)",
                    "token_classes": {
                        "classes": names,
                        "tokens": [1, 1, 1],
                        "real": [1, 1, 9000],
                        "none": [0, 0, 0],
                        "rare_at_most": 2,
                        "layers": [{"site": "model.layers.9999.", "of": 2, "real": [0, 0, 0]}],
                    },
                }
            ],
        }
    ]
    text = render(record, config)
    assert "<script>" not in text
    assert "\n# d" not in text
    assert "](u)" not in text.replace("\\]", "")
    found = classes_of(record)
    assert found is not None
    drawn = ElementTree.fromstring(plot_classes(found))
    assert not list(drawn.iter(f"{SVG}script"))


OPTIONS: dict[str, Any] = {"null_experts": 8, "top_k": 6, "null_kind": "zero", "via": None}


@pytest.mark.parametrize(
    ("options", "title", "line", "tags"),
    [
        ({}, "m, with 8 null experts", "the mixtures of `m` got 8 null experts of kind zero", []),
        (
            {"target_compute": 0.7, "data": "0" * 64},
            "m, with 8 null experts",
            "for 6 slots; null biases were set on text",
            [],
        ),
        (
            {"via": "upcycle", "experts": 4},
            "m, upcycled to 4 experts and with 8 null experts",
            "`m` was upcycled to 4 experts, and its mixtures got 8 null experts",
            ["sparse-upcycling"],
        ),
        (
            {"via": "moefy", "num_experts": 16, "data": "0" * 64},
            "m, split into 16 experts and with 8 null experts",
            "got 8 null experts of kind zero each, for 6 slots (",
            ["moefication"],
        ),
        (
            {"materialize": True},
            "m, with 8 experts of zeros",
            "got 8 experts of zeros each, which stand for null experts",
            [],
        ),
    ],
)
def test_the_stage_is_told(
    options: dict[str, Any], title: str, line: str, tags: list[str], measured: Path
) -> None:
    record, config = content(measured)
    record |= {"method": "adamoe", "options": OPTIONS | options, "history": []}
    record["sources"] = [{"label": "m", "revision": None}]
    text = render(record, config)
    assert f"# {title}\n" in text
    assert line in text
    for tag in ("null-experts", "adamoe", *tags):
        assert f"\n- {tag}\n" in text
    assert ("The routers are not trained." in text) == bool(tags)


def test_a_fine_tune_tells_its_share(stages: Callable[[str], Path]) -> None:
    record, config = content(stages("finetune"))
    training = record["training"]
    assert "real experts" not in render(record, config)
    training["first"] |= {"share": 1.0, "idle": 0.0}
    training["last"] |= {"share": 0.7031, "idle": 0.02, "share_by_layer": [0.7, 0.7062]}
    for layer, share in zip(training["routing"]["layers"], (0.69, 0.72), strict=True):
        layer["share"] = share
    held = {"names": ["a"], "losses": [2.0], "loss": 2.0}
    training["validation"] = [
        {"step": 0, **held, "share": 0.9, "shares": [0.9]},
        {"step": 2, **held, "share": 0.71, "shares": [0.71]},
    ]
    text = render(record, config)
    assert "| real experts run, share of those without null experts | 1 | 0.7031 |" in text
    assert "| share of tokens without a real expert | 0 | 0.02 |" in text
    assert "| on held-out text: real experts run, share of those without null experts" in text
    assert "| 0.9 | 0.71 |" in text
    assert "Of the real experts 0.705 ran, 0.69 to 0.72 by layer." in text


def test_a_fine_tune_tells_the_budget_asked_for(nulled: Path, text: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"target_compute": 0.7, "layer_budget": "0=0.9", "balance": 0.02}
    options: dict[str, Any] = {"data": [text], "steps": 2, "seq_len": 32, "batch_size": 2}
    api.finetune(nulled, tmp_path / "a", compute_ramp=0.0, null_rate=0.1, **asked, **options)
    shown = (
        "   - Of routers: `balance=0.02`, `compute_ramp=0.0`, `layer_budget=0=0.9`, "
        "`null_rate=0.1`, `target_compute=0.7`\n"
    )
    assert shown in (tmp_path / "a" / CARD).read_text()
    record, config = content(tmp_path / "a")
    routing = record["options"]["routing"]
    routing |= {"target": None, "layers": None, "balance": None, "ramp": None, "null_rate": 0.2}
    assert "Of routers" not in render(record, config)
    for damaged in ({"target": []}, [1], None):
        record["options"]["routing"] = damaged
        assert "Of routers" not in render(record, config)


def test_other_cards_say_nothing_of_it(stages: Callable[[str], Path]) -> None:
    for name in ("moefy", "calibrated"):
        folder = stages(name)
        assert "null experts" not in (folder / CARD).read_text()
        assert not (folder / CLASSES_PLOT).exists()
        record, config = content(folder)
        assert classes_of(record) is None
        assert "runs every expert" in render(record, config) or name == "moefy"


def test_what_is_told_of_routers_is_what_a_fine_tune_records() -> None:
    options = {field: name for name, field in ROUTING_OPTIONS.items()}
    recorded = {key: (options[key], value) for key, value in Routing().to_json().items()}
    assert dict(ROUTING) == recorded
