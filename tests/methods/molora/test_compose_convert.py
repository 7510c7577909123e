"""Composed adapters from folders to folders: what is written loads, and is the same every time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.numpy import load_file

from adaconvert import api
from adaconvert.errors import OptionError, SourceError
from adaconvert.methods.molora.arrow import arrow_rows
from adaconvert.methods.molora.compose import compose
from adaconvert.methods.molora.lora_folder import read_lora
from adaconvert.methods.molora.phatgoose import router_rows
from adaconvert.methods.sources import open_source
from adaconvert.modeling.loading import load_model
from adaconvert.testing.adapters_in_peft import logits_of
from adaconvert.testing.loras import change_config, make_lora

Dense = Callable[..., Path]
EPS = float(numpy.finfo(numpy.float32).eps)


@pytest.fixture(scope="module")
def llama(dense: Dense) -> Path:
    return dense("llama")


@pytest.fixture(scope="module")
def loras(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two adapters that differ in rank, strength and linears."""
    root = tmp_path_factory.mktemp("loras")
    wide = {"target_modules": ["q_proj", "up_proj"], "r": 6, "use_rslora": True}
    return (
        str(make_lora(llama, root / "first")),
        str(make_lora(llama, root / "second", seed=1, **wide)),
    )


def convert(llama: Path, folder: Path, loras: tuple[str, ...], **options: Any) -> Path:
    given = {"adapters": loras, "method": "molora", "verify": False, **options}
    api.convert(llama, destination=folder, **given)
    return folder


def texts(tmp_path: Path) -> tuple[str, ...]:
    found = []
    for name, text in (("one", "a first text of its own. "), ("two", "1 2 3 and then 4 5. ")):
        path = tmp_path / f"{name}.txt"
        path.write_text(text * 12)
        found.append(str(path))
    return tuple(found)


def in_peft(llama: Path, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    import adaconvert.auto  # noqa: F401

    return logits_of(PeftModel.from_pretrained(load_model(llama), str(folder)).eval())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() <= 64 * EPS * expected.norm())


@pytest.mark.parametrize("routing", ["arrow", "phatgoose", "soft", "topp", "uniform"])
def test_folder_and_standalone_are_one_model(
    routing: str, llama: Path, loras: tuple[str, ...], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"routing": routing}
    if routing == "phatgoose":
        options |= {"data": texts(tmp_path), "gate_steps": 2, "device": "cpu"}
    folder = convert(llama, tmp_path / "folder", loras, **options)
    alone = convert(llama, tmp_path / "alone", loras, standalone=True, **options)
    found = in_peft(llama, folder)
    assert near(found, logits_of(load_model(alone)))
    assert not near(found, logits_of(load_model(llama)))
    again = convert(llama, tmp_path / "again", loras, **options)
    assert content(again) == content(folder)


def test_arrow_is_verified(llama: Path, loras: tuple[str, ...], tmp_path: Path) -> None:
    folder = convert(llama, tmp_path / "folder", loras, routing="arrow", verify=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["num_experts"] == 2
    assert config["r"] == 6
    assert config["scaling"] == [2.0, 8 / 6**0.5]
    assert config["router"] == {
        "kind": "linear",
        "reads": "module",
        "score": "abs",
        "norm": "none",
        "scale": 1.0,
    }
    assert config["select"] == {"rule": "top-k", "k": 2, "renormalize": True}
    stored = load_file(folder / "adapter_model.safetensors")
    composed = compose([read_lora(path) for path in loras], open_source(str(llama)))
    for path in composed.paths:
        a, b = composed.stack(path)
        name = f"base_model.model.{path}.molora_"
        assert numpy.array_equal(stored[f"{name}A"], a)
        assert numpy.array_equal(stored[f"{name}B"], b)
        assert numpy.array_equal(stored[f"{name}router"], arrow_rows(a, b))


def test_gates_go_into_routers(llama: Path, loras: tuple[str, ...], tmp_path: Path) -> None:
    options = {"data": texts(tmp_path), "gate_steps": 3, "device": "cpu"}
    work = tmp_path / "work"
    goose = {"routing": "phatgoose", "work": str(work), **options}
    folder = convert(llama, tmp_path / "folder", loras, **goose)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["router"]["norm"] == "layernorm"
    assert config["select"] == {"rule": "top-k", "k": 2, "renormalize": True}
    kept = [numpy.load(work / f"gate.{index}.npz") for index in range(2)]
    stored = load_file(folder / "adapter_model.safetensors")
    for path in compose([read_lora(p) for p in loras], open_source(str(llama))).paths:
        gates = numpy.concatenate([one[f"v {path}"] for one in kept])
        router = stored[f"base_model.model.{path}.molora_router"]
        assert numpy.array_equal(router, router_rows(gates))
    # what is finished is not trained again, and nothing else changes the result
    assert content(convert(llama, tmp_path / "again", loras, **goose)) == content(folder)
    other = {**goose, "gate_steps": 4}
    with pytest.raises(OptionError, match="belongs to another run"):
        convert(llama, tmp_path / "other", loras, **other)


def test_manifest_names_adapters_and_no_paths(
    llama: Path, loras: tuple[str, ...], tmp_path: Path
) -> None:
    goose = {"routing": "phatgoose", "data": texts(tmp_path), "gate_steps": 1, "device": "cpu"}
    folder = convert(llama, tmp_path / "folder", loras, work=str(tmp_path / "w"), **goose)
    manifest = (folder / "adaconvert.json").read_text()
    options = json.loads(manifest)["options"]
    assert options["adapters"] == ["first", "second"]
    assert "experts in their order: first, second" in manifest
    assert len(options["adapters_digest"]) == 64
    assert [len(digest) for digest in options["data"]] == [64, 64]
    assert str(tmp_path) not in manifest
    assert not any(str(Path(lora).parent) in manifest for lora in loras)


def test_the_folder_one_is_in(
    llama: Path, loras: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(loras[0])
    folder = convert(llama, tmp_path / "folder", (".", "../second"), routing="arrow")
    options = json.loads((folder / "adaconvert.json").read_text())["options"]
    assert options["adapters"] == ["first", "second"]


def test_uniform_is_one_plain_lora(llama: Path, loras: tuple[str, ...], tmp_path: Path) -> None:
    from peft import PeftModel

    plain = convert(llama, tmp_path / "plain", loras, routing="uniform", as_plain_lora=True)
    assert json.loads((plain / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs: Any = PeftModel.from_pretrained(load_model(llama), loras[0], adapter_name="a")
    theirs.load_adapter(loras[1], adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="cat")
    theirs.set_adapter("mean")
    assert near(in_peft(llama, plain), logits_of(theirs.eval()))
    # and can become an expert again
    again = convert(llama, tmp_path / "again", (str(plain), loras[0]), routing="uniform")
    assert json.loads((again / "adapter_config.json").read_text())["r"] == 12


def test_adapters_of_a_half_precision_base(
    llama: Path, loras: tuple[str, ...], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    load_model(llama, dtype="bfloat16").save_pretrained(half)
    folder = convert(half, tmp_path / "folder", loras, routing="arrow")
    # the adapters keep the precision they were trained in
    assert {one.dtype.name for one in load_file(folder / "adapter_model.safetensors").values()} == {
        "float32"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "q_proj"}, "--target-modules: does nothing with --from"),
        ({"experts": 4}, "--experts: does nothing with --from"),
        ({"work": "w"}, "--work: does nothing with --routing soft"),
        ({"routing": "arrow", "router": "shared"}, "--router: does nothing with --routing arrow"),
        ({"routing": "arrow", "k": 3}, "--k: is more adapters than there are; expected 2, found 3"),
        ({"routing": "phatgoose"}, "--data: phatgoose trains the gate of each adapter"),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, Any], message: str, llama: Path, loras: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        convert(llama, tmp_path / "folder", loras, **options)
    assert not (tmp_path / "folder").exists()


def test_an_adapter_of_other_weights(
    llama: Path, dense: Dense, loras: tuple[str, ...], tmp_path: Path
) -> None:
    own = convert(llama, tmp_path / "own", loras[:1], routing="uniform", as_plain_lora=True)
    recorded = json.loads((own / "adapter_config.json").read_text()).get("base_fingerprint")
    folder = Path(shutil.copytree(loras[0], tmp_path / "marked"))
    change_config(folder, lambda config: config.update(base_fingerprint=recorded or "0" * 64))
    with pytest.raises(SourceError, match=r"marked/adapter_config.json: .* for another base"):
        convert(dense("llama", seed=1), tmp_path / "other", (str(folder),))
