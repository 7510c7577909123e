"""An adapter folder on its base, as a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert import api
from adaconvert.errors import OptionError, SourceError
from adaconvert.methods.molora.adapter_source import is_adapter_folder, open_adapters
from adaconvert.methods.molora.view import standing, viewed
from adaconvert.methods.sources import open_source
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adapter_folders_by_hand import make_folder, make_lora
from adaconvert.testing.adapters_by_hand import make_adapted
from adaconvert.testing.adaptive_by_hand import make_adaptive

WEIGHTS = "adapter_model.safetensors"
FORMS: Mapping[str, dict[str, Any]] = {
    "soft": {},
    "layer": {"reads": "layer"},
    "shared": {"reads": "shared", "select": {"rule": "top-k", "k": 2, "renormalize": True}},
    "share-a": {"share": "a", "scaling": [1.0, 2.0, 3.0, 0.5]},
    "vectors": {"kind": "ia3", "linears": ("k_proj", "v_proj")},
    "inputs": {"kind": "ia3", "linears": ("down_proj",), "on": "input"},
    "no-router": {"router": {"kind": "none"}, "select": {"rule": "uniform"}},
    "arrow": {
        "router": {"score": "abs", "scale": 0.5},
        "select": {"rule": "top-k", "k": 3, "renormalize": True},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama-tied", tmp_path_factory.mktemp("base") / "dense")


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    return make_folder(make_adapted(base, base.parent / "alone"), base, base.parent / "routed")


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    path = base.parent / "text.jsonl"
    rows = [{"text": f"the cat number {i % 7} sat on the mat and slept. " * 3} for i in range(9)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@torch.inference_mode()
def logits_of(folder: Path) -> torch.Tensor:
    model: Any = load_model(folder)
    found: torch.Tensor = model(torch.arange(24).reshape(2, 12)).logits
    return found


@pytest.mark.parametrize("form", FORMS)
def test_view_computes_what_the_standalone_form_does(base: Path, tmp_path: Path, form: str) -> None:
    alone = make_adapted(base, tmp_path / "alone", **FORMS[form])
    routed = make_folder(alone, base, tmp_path / "routed")
    with viewed(routed) as view:
        found = logits_of(view.root)
        item = open_source(str(view.root))
    assert torch.equal(found, logits_of(alone))
    assert not torch.equal(found, logits_of(base))
    assert item.source.label == "routed"
    assert not view.root.parent.exists()


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "qwen3", "mixtral", "gemma3_text"])
def test_families(family: str, tmp_path: Path) -> None:
    ends = {"gpt2": "c_attn", "phi3": "qkv_proj", "gpt_neox": "dense_h_to_4h"}
    base = tiny_models.make(family, tmp_path / "base")
    alone = make_adapted(base, tmp_path / "alone", linears=(ends.get(family, "o_proj"),))
    with viewed(make_folder(alone, base, tmp_path / "routed")) as view:
        assert torch.equal(logits_of(view.root), logits_of(alone))


def test_base_that_is_adaptive_keeps_its_sites(base: Path, tmp_path: Path) -> None:
    split = make_adaptive(base, tmp_path / "split", router="param-center", experts=8)
    alone = make_adapted(split, tmp_path / "alone")
    routed = make_folder(alone, split, tmp_path / "routed")
    with viewed(routed) as view:
        assert torch.equal(logits_of(view.root), logits_of(alone))
        sites = open_source(str(view.root)).spec.adaptive
    assert sites is not None
    assert sum("ffn" in slots for slots in sites["sites"].values()) == 2  # type: ignore[attr-defined]


def test_base_of_one_file(tmp_path: Path) -> None:
    base = tiny_models.make("llama-tied", tmp_path / "base", max_shard_size="1GB")
    alone = make_adapted(base, tmp_path / "alone")
    with viewed(make_folder(alone, base, tmp_path / "routed")) as view:
        assert torch.equal(logits_of(view.root), logits_of(alone))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}},
        {"layers_to_transform": [1]},
    ],
)
def test_stock_lora_is_bit_identical_to_peft(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    made = make_lora(base, tmp_path / "7", **settings)
    with torch.inference_mode():
        model = peft.PeftModel.from_pretrained(load_model(base), made, adapter_name="one")
        wanted = model(torch.arange(24).reshape(2, 12)).logits
    with viewed(made) as view:
        assert torch.equal(logits_of(view.root), wanted)


def test_routed_folder_is_bit_identical_to_peft(base: Path, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    import adaconvert.auto  # noqa: F401

    with torch.inference_mode():
        model = peft.PeftModel.from_pretrained(load_model(base), folder)
        wanted = model(torch.arange(24).reshape(2, 12)).logits
    with viewed(folder) as view:
        assert torch.equal(logits_of(view.root), wanted)


def test_checkpoints_stand_for_themselves(base: Path) -> None:
    with standing(str(base)) as (where, view):
        assert (where, view) == (str(base), None)
    with (
        pytest.raises(OptionError, match="--base: is for adapter folders"),
        standing(str(base), base=str(base)),
    ):
        pass


def test_missing_folder_is_no_adapter_folder(tmp_path: Path) -> None:
    assert not is_adapter_folder(tmp_path / "nothing")
    assert not is_adapter_folder("\0")


def changed(folder: Path, target: Path, **changes: object) -> Path:
    """Return a copy of a folder with other keys in its adapter_config.json."""
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_base_elsewhere(base: Path, folder: Path, tmp_path: Path) -> None:
    moved = changed(folder, tmp_path / "moved", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(SourceError, match=r"its base cannot be opened: .*Name the folder of the"):
        viewed(moved).__enter__()
    with viewed(moved, base=str(base)) as view:
        assert view.base.source.label == "dense"
    nameless = changed(folder, tmp_path / "nameless", base_model_name_or_path=None)
    with pytest.raises(SourceError, match=r"does not say which model it is for.*--base"):
        viewed(nameless).__enter__()


def test_copy_of_a_hub_model_does_not_take_its_name(
    base: Path, folder: Path, tmp_path: Path
) -> None:
    for named, wanted in (("org/model", "org/model"), ("/gone", str(base)), (None, str(base))):
        moved = changed(folder, tmp_path / str(wanted == named), base_model_name_or_path=named)
        with viewed(moved, base=str(base)) as view:
            assert view.named == wanted
        shutil.rmtree(moved)


def test_calibrate_refuses_adapters(folder: Path, text: Path) -> None:
    with pytest.raises(OptionError, match="holds adapters, which choose no experts"):
        api.calibrate(folder, text, budget=0.9)


def test_inspect(folder: Path) -> None:
    told = "\n".join(api.inspect(folder).lines())
    assert "4 LoRA of rank 2 on 4 linears, weighed by soft, a router each" in told


def test_another_base(folder: Path, tmp_path: Path) -> None:
    wide = tiny_models.make("llama-tied", tmp_path / "wide", hidden_size=64)
    with pytest.raises(SourceError, match="does not fit its configuration and base; expected"):
        viewed(folder, base=str(wide)).__enter__()
    other = tiny_models.make("gpt2", tmp_path / "gpt2")
    with pytest.raises(SourceError, match="where a GPT2LMHeadModel has no linear"):
        viewed(folder, base=str(other)).__enter__()


def test_fingerprint_tells_bases_apart(base: Path, folder: Path, tmp_path: Path) -> None:
    from adaconvert.io.fingerprint import of_model

    model: Any = load_model(base)
    ends = ("q_proj", "v_proj")
    linears = {path: module for path, module in model.named_modules() if path.endswith(ends)}
    marked = changed(folder, tmp_path / "marked", base_fingerprint=of_model(linears))
    with viewed(marked):
        pass
    other = tiny_models.make("llama-tied", tmp_path / "other", seed=1)
    with pytest.raises(SourceError, match="was made for another base than other"):
        viewed(marked, base=str(other)).__enter__()


def test_stock_lora_is_held_to_the_base_it_names(base: Path, tmp_path: Path) -> None:
    lora = make_lora(base, tmp_path / "lora")
    copied = shutil.copytree(base, tmp_path / "copied")
    with viewed(lora, base=str(copied)):
        pass
    other = tiny_models.make("llama-tied", tmp_path / "other", seed=1)
    with pytest.raises(SourceError, match="was made for another base than other"):
        viewed(lora, base=str(other)).__enter__()
    gone = changed(lora, tmp_path / "moved", base_model_name_or_path=str(tmp_path / "gone"))
    with viewed(gone, base=str(other)):
        pass


def test_damaged_folders(base: Path, folder: Path, tmp_path: Path) -> None:
    kinds = changed(folder, tmp_path / "kind", peft_type="IA3")
    with pytest.raises(SourceError, match="expected peft_type MOLORA or LORA, found IA3"):
        open_adapters(kinds)
    lacks = changed(folder, tmp_path / "lacks")
    tensors = load_file(folder / WEIGHTS)
    first = next(name for name in tensors if name.endswith("molora_B"))
    save_file({k: v for k, v in tensors.items() if k != first}, lacks / WEIGHTS)
    with pytest.raises(SourceError, match=r"adapters\.b of .* does not fit .*found none"):
        viewed(lacks, base=str(base)).__enter__()
    more = changed(folder, tmp_path / "more")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2)}, more / WEIGHTS)
    with pytest.raises(SourceError, match=r"is no part of adapters on linears: .*lm_head"):
        open_adapters(more)
    cut = changed(folder, tmp_path / "cut")
    weights = cut / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SourceError, match="1 byte short"):
        open_adapters(cut)
    odd = changed(folder, tmp_path / "odd", router=None)
    with pytest.raises(SourceError, match="does not describe routed adapters"):
        viewed(odd).__enter__()
    weights = changed(folder, tmp_path / "none") / WEIGHTS
    weights.unlink()
    with pytest.raises(SourceError, match="file is missing"):
        open_adapters(weights.parent)
    (weights.parent / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match="pickled weights are never opened"):
        open_adapters(weights.parent)


def lacks_name() -> str:
    return WEIGHTS


def test_evaluate(base: Path, folder: Path, text: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": text, "device": "cpu", "length": 32, "speed": False}
    alone = api.evaluate(base.parent / "alone", **given)
    found = api.evaluate(folder, reference=base, **given)
    assert found.checkpoint == "routed"
    assert found.results[0].loss == alone.results[0].loss
    assert found.reference is not None
    assert found.reference.loss != found.results[0].loss
    cost, wanted = found.results[0].compute, alone.results[0].compute
    assert cost is not None
    assert wanted is not None
    assert cost.flops == wanted.flops
    moved = changed(folder, tmp_path / "moved", base_model_name_or_path="no/where")
    again = api.evaluate(moved, base=base, **given)
    assert again.results[0].loss == alone.results[0].loss
    with pytest.raises(OptionError, match="--base"):
        api.evaluate(base, base=base, **given)
