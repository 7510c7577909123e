"""Adaptive models refuse configs they cannot run, missing routers, and knobs out of reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaconvert.errors import SourceError
from adaconvert.modeling.loading import load_model


def test_reentrant_checkpointing_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="use_reentrant=False"):
        llama.gradient_checkpointing_enable({"use_reentrant": True})


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for slots in changes.get("sites", {}).values():
        if slots.get("ffn") == "own":
            slots["ffn"] = config["adaptive"]["sites"]["model.layers.0.mlp"]["ffn"]
    config["adaptive"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version is 2 and this code knows up to 1"),
        ({"version": "1"}, "expected 1"),
        ({"colour": 1}, "unknown keys colour"),
        ({"sites": {"model.layers.0.mlp": {"ffn": None}}}, "ffn is NoneType, expected an object"),
        (
            {"sites": {"model.layers.9.mlp": {"ffn": "own"}}},
            "which AdaptiveLlamaForCausalLM does not have",
        ),
        ({"sites": {"model.layers.0.mlp": {"wings": {}}}}, "unknown keys wings"),
        ({"sites": {"model.layers.0": {"layer": {"skip": {}}}}}, "layer has unknown keys skip"),
    ],
)
def test_config_that_cannot_be_run_is_refused(
    folders: Any, tmp_path: Path, changes: Any, message: str
) -> None:
    import shutil

    folder = tmp_path / "edited"
    shutil.copytree(folders("llama")[1], folder)
    edit(folder, **changes)
    with pytest.raises(SourceError, match=message):
        load_model(folder)


def test_missing_router_is_refused(folders: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "edited"
    shutil.copytree(folders("llama")[1], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.router.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks model\.layers\.1\.mlp\.router\.weight"):
        load_model(folder)


@pytest.mark.parametrize("compute", [0, -1, 0.01, "half", float("nan")])
def test_unreachable_compute_is_refused(llama: Any, compute: Any) -> None:
    with pytest.raises(ValueError, match="compute"):
        llama.set_compute(compute)


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        ("top-k", {"k": 0}, "expected 1 to 8"),
        ("top-k", {"k": 9}, "expected 1 to 8"),
        ("top-k", {"k": 1.5}, "whole number"),
        ("top-k", {}, "needs a number k"),
        ("dynamic-k", {"tau": 1.5}, r"expected 0\.0 to 1\.0"),
        ("dynamic-k", {"tau": float("nan")}, "needs a number tau"),
        ("best", {}, "known: all, top-k"),
        ("top-k", {"k": 2, "tau": 1.0}, "takes k"),
    ],
)
def test_wrong_selection_is_refused(llama: Any, rule: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama.set_select(rule, **value)


def test_router_missing_under_another_head_is_refused(folders: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from adaconvert.modeling import modeling_adaptive

    folder = tmp_path / "edited"
    shutil.copytree(folders("llama")[1], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.router.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    made: Any = modeling_adaptive.AdaptiveLlamaForSequenceClassification
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.router\.weight"):
        made.from_pretrained(folder, num_labels=3)


def test_stated_bound_is_within_reach(llama: Any) -> None:
    with pytest.raises(ValueError, match="out of reach") as refused:
        llama.set_compute(0.1)
    stated = str(refused.value).split("can run ")[1].split(" to")[0]
    llama.set_compute(float(stated))
