"""Code that a checkpoint brings along is never run, whether exits are added or trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaconvert import api
from adaconvert.errors import AdaconvertError
from adaconvert.modeling.loading import CODE_FILES
from adaconvert.testing.exits_by_hand import by_hand
from adaconvert.testing.tiny_models import make
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.run import RunSettings, finetune


def with_code(folder: Path, payload: Path, **config: object) -> Path:
    """Return the checkpoint with code of its own, which leaves a folder behind when it is run."""
    for name in ("modeling_x.py", "configuration_x.py", "__init__.py", *CODE_FILES):
        (folder / name).write_text(f"import os; os.mkdir({str(payload)!r})")
    mapped = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.X"}
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": mapped, **config}))
    return folder


def tuned(source: Path, folder: Path) -> Path:
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": "a cat sat on a mat. " * 9}) for _ in range(8)))
    options = {"steps": 1, "seq_len": 16, "batch_size": 2, "train": ("exits",), "save_every": 0}
    config = FinetuneConfig.of([str(text)], options)
    finetune(str(source), config, RunSettings(destination=folder / "tuned", device="cpu"))
    return folder / "tuned"


def test_code_beside_known_weights_is_not_run(tmp_path: Path) -> None:
    payload = tmp_path / "payload"
    dense = make("llama", tmp_path / "dense", layers=3, max_shard_size="1GB")
    exits = with_code(by_hand(dense, tmp_path / "exits", [1], "norm"), payload)
    api.convert(
        with_code(dense, payload), destination=tmp_path / "made", method="early-exit", exits="1"
    )
    for made in (tmp_path / "made", tuned(exits, tmp_path)):
        assert not list(made.glob("*_x.py"))
        written = json.loads((made / "config.json").read_text())["auto_map"]
        assert all(
            named.startswith("modeling_adaptive.") or "configuration_adaptive." in named
            for named in written.values()
        )
    assert not payload.exists()


def test_a_model_only_its_own_code_knows_is_refused(tmp_path: Path) -> None:
    payload = tmp_path / "payload"
    dense = make("llama", tmp_path / "dense", layers=3, max_shard_size="1GB")
    exits = by_hand(dense, tmp_path / "exits", [1], "norm")
    for source in (dense, exits):
        with_code(source, payload, model_type="no_such_type")
        with pytest.raises(AdaconvertError, match="no_such_type") as caught:
            api.convert(source, destination=tmp_path / "made", method="early-exit", exits="1")
        assert caught.value.exit_code == 3
        with pytest.raises(AdaconvertError, match="no_such_type") as caught:
            tuned(source, tmp_path)
        assert caught.value.exit_code == 3
    assert not payload.exists()
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "tuned").exists()
