"""Options and checkpoints that cannot be split, or cannot be put together: each a clear error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import adaconvert
from adaconvert.api import unmoefy
from adaconvert.errors import AdaconvertError, DataError, OptionError, SourceError
from adaconvert.testing.tiny_models import make


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("models") / "dense", max_shard_size="1GB")


@pytest.fixture(scope="module")
def split(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "moe"
    adaconvert.convert(
        dense, destination=folder, method="moefy", split="random", router="gate", verify=False
    )
    return folder


def test_a_file_in_place_of_the_kept_config_is_not_lost(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    shutil.copytree(dense, source)
    (source / "dense_config.json").write_text('{"mine": true}')
    for options in ({"method": "moefy"}, {"method": "d2dmoe", "stages": "2"}):
        with pytest.raises(SourceError, match=r"dense_config\.json: is the name under which.*Rena"):
            adaconvert.convert(source, destination=tmp_path / "moe", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]
    adaconvert.convert(
        source, destination=tmp_path / "native", method="moefy", native=True, num_experts=4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_experts": 5},
            "--num-experts: does not divide the 64 neurons of a feed-forward network; expected a "
            "divisor of 64, such as 1, 2, 4, 8, 16, 32, found 5",
        ),
        ({"expert_width": 48}, "--expert-width: does not divide the 64 neurons"),
        ({"num_experts": 4, "expert_width": 8}, "4 experts of 64 neurons have 16 each"),
        ({"num_experts": 0}, "--num-experts: out of range"),
        ({"split": "kmeans"}, "--split: unknown choice"),
        ({"split": "coactivation"}, "--data: is missing: --split coactivation looks at"),
        ({"rule": "threshold", "keep": 0.5}, "--data: is missing: --keep finds its thresholds"),
        ({"data": "x.txt"}, "--data: only means something with --split coactivation"),
        ({"tau": 0.5}, "--tau: only means something with --rule dynamic-k; found --rule top-k"),
        ({"rule": "dynamic-k", "tau": 1.5}, "--tau: out of range; expected 0.0 to 1.0, found 1.5"),
        ({"rule": "top-p", "top_p": float("nan")}, "--top-p: out of range"),
        ({"rule": "threshold", "threshold": -1.0}, "--threshold: out of range"),
        ({"num_experts": 4, "top_k": 5}, "--top-k: more experts per token than there are experts"),
        ({"shared_neurons": 8}, "--shared-neurons: only means something with --split shared"),
        ({"layers": "0-9"}, "--layers: the model has blocks 0 to 1"),
        ({"split": "random", "matrices": "up"}, "--matrices: only means something with"),
        ({"native": True, "top_k": 1}, "--top-k: does not go with --native"),
        ({"native": True, "num_experts": 32}, "transformers wants rows of 16 bytes"),
        ({"target": "mixtral"}, "--target: only means something with --native"),
        ({"num_expert": 4}, "moefy: num_expert: unknown option. Did you mean num_experts?"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    options: dict[str, object], message: str, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        adaconvert.convert(dense, destination=tmp_path / "out", method="moefy", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ('{"words": "none"}\n', "words"),
        ('{"text": 3}\n', "is not text"),
    ],
)
def test_unusable_text_is_refused(content: str, message: str, dense: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    with pytest.raises(DataError, match=message):
        adaconvert.convert(
            dense,
            destination=tmp_path / "out",
            method="moefy",
            split="coactivation",
            data=str(data),
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl"]


def test_an_encoder_cannot_be_run_on_text(tmp_path: Path, text: Path) -> None:
    source = make("bert", tmp_path / "dense")
    with pytest.raises(OptionError, match="--data: a bert cannot be run layer by layer on text"):
        adaconvert.plan(source, method="moefy", split="coactivation", data=str(text))


def test_a_plain_network_has_no_gate_to_compare(tmp_path: Path) -> None:
    source = make("gpt2", tmp_path / "dense")
    with pytest.raises(OptionError, match="--matrices: a gpt2 has no gate"):
        adaconvert.plan(source, method="moefy", matrices="gate+up")


def test_no_native_form_is_refused_with_what_works(tmp_path: Path) -> None:
    source = make("gpt2", tmp_path / "dense")
    with pytest.raises(OptionError, match="no MoE architecture of transformers holds this gpt2"):
        adaconvert.plan(source, method="moefy", native=True, num_experts=4)


def test_kinds_of_checkpoints_are_told_apart(dense: Path, split: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SourceError, match=r"is already adaptive .* moefy needs a dense model"):
        adaconvert.convert(split, destination=out, method="moefy")
    with pytest.raises(SourceError, match=r"is already adaptive .* upcycle needs a dense model"):
        adaconvert.convert(split, destination=out, method="upcycle")
    with pytest.raises(SourceError, match=r"is a dense model .* unmoefy undoes moefy"):
        unmoefy(dense, out)
    with pytest.raises(OptionError, match="moefy takes one checkpoint; expected 1, found 2"):
        adaconvert.convert(dense, dense, destination=out, method="moefy")


def _edited(split: Path, folder: Path, edit: object) -> Path:
    """Return a copy of a split checkpoint with `edit(config)` applied to its config.json."""
    folder.mkdir()
    for file in split.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((split / "config.json").read_text())
    edit(config)  # type: ignore[operator]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SITE = "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(adaptive=None), "adaptive is not usable; expected an object"),
        (lambda c: c["adaptive"].update(version=2), "adaptive.version is not one this adaconvert"),
        (lambda c: c["adaptive"].pop("base"), "adaptive.base is not usable"),
        (lambda c: c["adaptive"].update(sites=[]), "adaptive.sites is not usable"),
        (
            lambda c: c["adaptive"]["sites"].update({"model.layers.7.mlp": {"ffn": {}}}),
            "adaptive.sites names 'model.layers.7.mlp', where a LlamaForCausalLM has no",
        ),
        (
            lambda c: c["adaptive"]["sites"][SITE]["ffn"].pop("experts"),
            "expected partition, experts, router and select",
        ),
        (
            lambda c: c["adaptive"]["sites"][SITE]["ffn"].update(shared=1),
            r"expected shared \+ experts.count \* experts.width to be 64",
        ),
        (
            lambda c: c["adaptive"]["sites"][SITE]["ffn"].update(router={"kind": "none such"}),
            "router.kind is not usable",
        ),
        (lambda c: c["adaptive"]["model"].update(exits={"at": 1}), "exits is not usable"),
        (
            lambda c: c["adaptive"]["sites"][SITE]["ffn"].update(activation="relu"),
            "holds more than split networks: activation relu",
        ),
    ],
)
def test_damaged_adaptive_configs_are_refused(
    edit: object, message: str, split: Path, tmp_path: Path
) -> None:
    folder = _edited(split, tmp_path / "edited", edit)
    with pytest.raises(AdaconvertError, match=message):
        unmoefy(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("damage", ["twice", "outside", "dtype"])
def test_an_order_that_is_none_is_refused(damage: str, split: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = _edited(split, tmp_path / "edited", lambda config: None)
    tensors = load_file(folder / "model.safetensors")
    name = f"{SITE}.neuron_order"
    if damage == "twice":
        tensors[name][0] = tensors[name][1]
    elif damage == "outside":
        tensors[name][0] = 64
    else:
        tensors[name] = tensors[name].to(torch.int64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    wanted = "is not that of an order" if damage == "dtype" else "is no permutation of the neurons"
    with pytest.raises(SourceError, match=wanted):
        unmoefy(folder, tmp_path / "back", verify=False)
    assert not (tmp_path / "back").exists()


def test_a_foreign_auto_map_does_not_pass_verification(split: Path, dense: Path) -> None:
    from adaconvert.io import manifest
    from adaconvert.verification.integrity import check

    record = manifest.read(split)
    assert check(split, record).ok
    config = split / "config.json"
    before = config.read_text()
    try:
        config.write_text(before.replace("modeling_adaptive.AdaptiveLlamaModel", "evil.Model"))
        found = check(split, record)
    finally:
        config.write_text(before)
    assert any("'auto_map', which could load code" in p.what for p in found.problems)
