"""Heads of exits know the blocks they were made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from adaconvert import api
from adaconvert.arch.trunk import check_trunk, foreign, trunk_of
from adaconvert.errors import SourceError
from adaconvert.methods.sources import open_source
from adaconvert.modeling.loading import load_model
from adaconvert.testing.tiny_models import make

WRONG = "made for other weights than the blocks in front of them"
SHORT: dict[str, Any] = {"steps": 2, "seq_len": 32, "batch_size": 2, "save_every": 0}


def trunk_in(folder: Path) -> Any:
    """Return what config.json says."""
    config = json.loads((folder / "config.json").read_text())
    return config["adaptive"]["model"]["exits"].get("trunk")


def with_exits(source: Path, out: Path, **given: Any) -> Path:
    """Return a checkpoint with an exit after its first block, whose head can learn."""
    given = {"exits": "1", "head": "norm", **given}
    api.convert(source, destination=out, method="early-exit", **given)
    return out


def is_foreign(folder: Path) -> bool:
    """Return whether a checkpoint's heads were made for other blocks."""
    item = open_source(str(folder))
    return foreign(item.source, item.spec) is not None


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"number {at}: the cat sat on the mat. " * 6} for at in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def spliced(tmp_path: Path) -> Path:
    """Return a checkpoint whose exits come from another one."""
    made = [
        with_exits(make("llama", tmp_path / f"dense{n}", seed=n), tmp_path / f"made{n}")
        for n in range(2)
    ]
    assert not any(map(is_foreign, made))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in made)
    ours |= {name: value for name, value in theirs.items() if name.startswith("exits.")}
    save_file(ours, made[0] / "model.safetensors", metadata={"format": "pt"})
    # with their heads comes what says whose they are
    (made[0] / "config.json").write_bytes((made[1] / "config.json").read_bytes())
    (made[0] / "adaconvert.json").unlink()
    return made[0]


def test_heads_of_another_trunk_are_told_of(spliced: Path, text: str, tmp_path: Path) -> None:
    assert any(WRONG in problem for problem in api.inspect(spliced).problems)
    found = api.evaluate(spliced, data=text, length=32, max_tokens=128, speed=False)
    assert any(WRONG in note for note in found.notes)
    with pytest.raises(SourceError, match=WRONG) as raised:
        api.calibrate(spliced, text, destination=tmp_path / "x")
    assert "finetune --train exits" in raised.value.describe()
    assert not (tmp_path / "x").exists()


def test_training_them_for_it_is_the_remedy(spliced: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    result: Any = api.finetune(spliced, out, data=text, train=("exits",), device="cpu", **SHORT)
    assert any(WRONG in note for note in result.summary["notes"])
    assert not is_foreign(out)
    assert trunk_in(out) != trunk_in(spliced)


@pytest.mark.parametrize("dtype", ["keep", "float16", "bfloat16"])
def test_a_trunk_trained_with_its_heads_is_theirs(dtype: str, text: str, tmp_path: Path) -> None:
    source = with_exits(make("llama", tmp_path / "dense"), tmp_path / "source")
    api.finetune(source, tmp_path / "out", data=text, device="cpu", dtype=dtype, lr=1e-2, **SHORT)
    assert trunk_in(tmp_path / "out") != trunk_in(source)
    assert not is_foreign(tmp_path / "out")


def test_a_trunk_trained_elsewhere_is_not(tmp_path: Path) -> None:
    import torch

    source = with_exits(make("llama", tmp_path / "dense"), tmp_path / "source")
    model = load_model(source)
    model.save_pretrained(tmp_path / "same")
    assert trunk_in(tmp_path / "same") == trunk_in(source) is not None
    assert not is_foreign(tmp_path / "same")
    # casts do not make another trunk of it
    for dtype in ("float16", "bfloat16", "float32"):
        cast = load_model(source, dtype=dtype)
        cast.save_pretrained(tmp_path / dtype)
        assert not is_foreign(tmp_path / dtype)
    load_model(tmp_path / "float16", dtype="float32").save_pretrained(tmp_path / "back")
    assert not is_foreign(tmp_path / "back")
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj").weight.mul_(1.1)
    model.save_pretrained(tmp_path / "moved")
    assert is_foreign(tmp_path / "moved")
    # who trained both says so
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["adaptive"]["model"]["exits"]["trunk"] = None
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    item = open_source(str(tmp_path / "moved"))
    check_trunk(item.source, item.spec)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("molora", {"standalone": True, "rank": 2, "experts": 2}),
        ("depth", {"kind": "skip", "layers": "1,2"}),
        ("depth", {"kind": "mod", "capacity": 0.5, "layers": "1,2"}),
    ],
)
def test_what_stands_beside_a_trunk_leaves_it_theirs(
    method: str, given: dict[str, Any], tmp_path: Path
) -> None:
    dense = make("llama", tmp_path / "dense", layers=4)
    source = with_exits(dense, tmp_path / "source", exits="2")
    api.convert(source, destination=tmp_path / "out", method=method, **given)
    assert trunk_in(tmp_path / "out") == trunk_in(source)
    assert not is_foreign(tmp_path / "out")


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "mixtral", "gpt_neox"])
def test_every_layout_has_a_digest(family: str, tmp_path: Path) -> None:
    dense = make(family, tmp_path / "dense")
    item = open_source(str(dense))
    found = trunk_of(item.source, item.spec)
    assert found is not None
    assert found != trunk_of(*_opened(make(family, tmp_path / "other", seed=1)))


def _opened(folder: Path) -> tuple[Any, Any]:
    item = open_source(str(folder))
    return item.source, item.spec


def test_a_checkpoint_that_does_not_say_is_taken_as_it_is(tmp_path: Path) -> None:
    source = with_exits(make("llama", tmp_path / "dense"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["adaptive"]["model"]["exits"]["trunk"]
    (source / "config.json").write_text(json.dumps(config))
    load_model(source)
    assert not is_foreign(source)


def test_what_is_no_digest_is_refused(tmp_path: Path) -> None:
    source = with_exits(make("llama", tmp_path / "dense"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["adaptive"]["model"]["exits"]["trunk"] = 7
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="trunk is 7, expected digests or null"):
        load_model(source)


def test_inspect_says_what_loading_refuses(tmp_path: Path) -> None:
    source = with_exits(make("llama", tmp_path / "dense"), tmp_path / "source")
    assert not api.inspect(source).problems
    config = json.loads((source / "config.json").read_text())
    config["adaptive"]["model"]["exits"]["decide"]["thresholds"] = [7]
    (source / "config.json").write_text(json.dumps(config))
    (problem,) = api.inspect(source).problems
    assert problem.startswith("cannot be loaded: config.adaptive.model.exits.decide.thresholds")
    with pytest.raises(SourceError, match="thresholds"):
        load_model(source)
