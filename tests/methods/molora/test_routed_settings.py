"""adapter_config.json of routed adapters: what is damaged is refused, and where is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.arch.adapters import sites_of
from adaconvert.errors import SourceError
from adaconvert.methods.molora.adapter_source import open_adapters
from adaconvert.testing.loras import change_config
from adaconvert.testing.tiny_models import make

Change = Callable[[dict[str, Any]], object]


def put(key: str, value: object) -> Change:
    """Return what gives a key of a file, or "part.key" of one of its objects, another value."""

    def change(config: dict[str, Any]) -> None:
        part, _, inner = key.rpartition(".")
        (config[part] if part else config)[inner] = value

    return change


def lose(key: str) -> Change:
    return lambda config: config.pop(key)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("routed")
    dense = make("llama", root / "dense")
    given: dict[str, Any] = {"experts": 2, "rank": 2, "target_modules": "q_proj,v_proj"}
    api.convert(dense, destination=root / "out", method="molora", **given)
    return root / "out"


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "adapter")


WRONG: tuple[tuple[Change, str], ...] = (
    *((lose(key), f"has no {key}") for key in ("num_experts", "r", "router", "select")),
    *((put("r", value), ": r: ") for value in (0, -1, "2", 2.0, True, None)),
    *((put("num_experts", value), ": num_experts: ") for value in (0, "2", 10**12)),
    *((put("lora_alpha", value), ": lora_alpha: ") for value in ("16", None, 10**400, -1)),
    *((put("scaling", value), ": scaling: ") for value in ("x", [1.0], [1.0, None])),
    *((put("router", value), ": router: ") for value in (None, "x", {}, {"kind": "none", "x": 1})),
    *((put(f"router.{key}", "zz"), f": router.{key}: ") for key in ("kind", "reads", "score")),
    (put("router.scale", "q"), ": router.scale: "),
    (put("select", None), ": select: "),
    (put("select", {}), "select.rule is"),
    (put("select", {"rule": "zz"}), "select.rule is 'zz'"),
    *((put("select", {"rule": "top-k", "k": k}), "top-k needs k") for k in (0, 9, "2")),
    (put("experts_kind", "zz"), ": experts_kind: "),
    (put("share", 5), ": share: "),
    (put("feedforward_modules", ["v_proj"]), ": feedforward_modules: "),
    (put("dropout", 5), ": dropout: "),
    (put("target_modules", None), ": target_modules: "),
    (put("target_modules", "("), ": target_modules: "),
    (put("target_modules", ["q_proj"]), "does not name 'model.layers.0.self_attn.v_proj'"),
)


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_what_means_nothing_is_refused_by_name(change: Change, words: str, folder: Path) -> None:
    change_config(folder, change)
    with pytest.raises(SourceError) as caught:
        open_adapters(folder)
    assert words in str(caught.value)
    assert "adapter/adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        put("scaling", 0.5),
        put("scaling", [0.5, 2.0]),
        put("lora_alpha", 0),
        put("router", {"kind": "linear"}),
        put("target_modules", r".*\.(q|v)_proj"),
        put("target_modules", "all-linear"),
        lose("experts_kind"),
        lose("dropout"),
    ],
)
def test_what_peft_reads_is_read(change: Change, folder: Path) -> None:
    change_config(folder, change)
    assert len(open_adapters(folder).tensors) == 4


def test_expression_of_modules_whose_input_is_scaled() -> None:
    config = {
        "num_experts": 2,
        "experts_kind": "ia3",
        "router": {"kind": "none"},
        "select": {"rule": "uniform"},
        "feedforward_modules": r".*\.down",
    }
    sites = sites_of(config, {"layers.0.down": (8, 8), "layers.0.up": (8, 8)})
    found = {path: slots["linear"]["adapters"]["on"] for path, slots in sites.items()}
    assert found == {"layers.0.down": "input", "layers.0.up": "output"}
