"""One small checkpoint of every stage, made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import adaconvert
from adaconvert import api
from adaconvert.testing.hub_cache import build_hub_cache
from adaconvert.testing.tiny_models import make

FRONT = (
    "---\nlicense: gemma\nlicense_name: terms\nlicense_link: https://example.com/t\n---\n# dense\n"
)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents enough to fit, to train and to calibrate on."""
    file = tmp_path_factory.mktemp("text") / "docs.jsonl"
    said = "document {0} says that the quick brown fox jumps over {1} lazy dogs, again and again. "
    rows = [json.dumps({"text": said.format(i, 7 * i) * 2}) for i in range(60)]
    file.write_text("\n".join(rows))
    return file


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint in the hub cache, with a card that states a licence."""
    root = tmp_path_factory.mktemp("hub")
    dense = make("llama", root / "dense")
    (dense / "README.md").write_text(FRONT)
    return build_hub_cache(root / "cache", "org/tiny", dense)


Stages = Callable[[str], Path]


@pytest.fixture(scope="session")
def stages(hub: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Return the folder of a checkpoint by the name of its last stage; read only."""
    root = tmp_path_factory.mktemp("stages")
    other = make("llama", root / "other", seed=1)

    def made(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            makers[name](folder)
        return folder

    def finetune(source: Path, folder: Path) -> None:
        options = {"steps": 2, "seq_len": 32, "batch_size": 2}
        api.finetune(source, folder, data=[text], **options)

    def two_sources(folder: Path) -> None:
        adaconvert.convert(hub, other, destination=folder, experts=2, top_k=1)

    def moefy(folder: Path) -> None:
        adaconvert.convert(hub, destination=folder, method="moefy", num_experts=8, top_k=4)

    def d2dmoe(folder: Path) -> None:
        options = {"num_experts": 8, "data_tokens": 1500, "router_steps": 20}
        api.d2dmoe(hub, folder, data=str(text), **options)

    def calibrated(folder: Path) -> None:
        options = {"length": 32, "rules": ("top-k",), "values": (8, 6, 4), "budget": 0.95}
        api.calibrate(made("moefy"), text, destination=folder, **options)

    makers: dict[str, Callable[[Path], object]] = {
        "upcycle": lambda folder: adaconvert.convert(hub, destination=folder, experts=4),
        "moefy": moefy,
        "d2dmoe": d2dmoe,
        "finetune": lambda folder: finetune(made("upcycle"), folder),
        "calibrated": calibrated,
        "two-sources": two_sources,
    }
    return made
