"""Cards and `inspect` name every rank and kind of adapters, and what a folder's own card told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import adaconvert
from adaconvert.export.card_adapters import adapted_words, auto_class, words
from adaconvert.export.card_facts import facts_of
from adaconvert.inspection import inspect_source
from adaconvert.io.source import Source
from adaconvert.methods.molora.view import viewed
from adaconvert.testing.adapter_folders_by_hand import make_lora
from adaconvert.testing.adapters_by_hand import make_adapted
from adaconvert.testing.tiny_models import make

FRONT = "---\nlicense: mit\nbase_model: org/base\n---\n# Adapters\n"
BY_EACH = "weighed token by token (soft) by a router of each linear's own, on its input"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("dense") / "dense")


@pytest.fixture(scope="module")
def mixed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of rank 2 on queries and of rank 5 on values, in one checkpoint."""
    root = tmp_path_factory.mktemp("mixed")
    first = make_adapted(dense, root / "first", linears=("q_proj",), rank=2)
    second = make_adapted(dense, root / "second", linears=("v_proj",), rank=5)
    return joined(first, second, root / "mixed")


def joined(first: Path, second: Path, folder: Path) -> Path:
    """Return `folder`, now the checkpoint `first` with the adapters of `second` as well."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(first, folder)
    tensors = [load_file(one / "model.safetensors") for one in (second, first)]
    save_file(tensors[0] | tensors[1], folder / "model.safetensors", metadata={"format": "pt"})
    held, more = (json.loads((one / "config.json").read_text()) for one in (first, second))
    held["adaptive"]["sites"] |= more["adaptive"]["sites"]
    (folder / "config.json").write_text(json.dumps(held))
    return folder


def both_texts(folder: Path) -> tuple[str, str]:
    """Return what the card says of a checkpoint's adapters, and what `inspect` does."""
    config = json.loads((folder / "config.json").read_text())
    return adapted_words(config), inspect_source(str(folder)).lines()[0]


def test_ranks_that_differ_from_linear_to_linear_are_named(mixed: Path) -> None:
    card, told = both_texts(mixed)
    assert card == f"4 LoRA of rank 2 to 5 per linear on 4 linears, {BY_EACH}"
    assert "4 LoRA of rank 2 to 5 on 4 linears, weighed by soft, a router each" in told
    assert "first of" not in told


def test_one_rank_is_named_as_ever(dense: Path, tmp_path: Path) -> None:
    card, told = both_texts(make_adapted(dense, tmp_path / "same", rank=3))
    assert card == f"4 LoRA of rank 3 per linear on 4 linears, {BY_EACH}"
    assert "4 LoRA of rank 3 on 4 linears, weighed by soft, a router each" in told


def test_kinds_and_routings_that_differ_are_named(dense: Path, tmp_path: Path) -> None:
    first = make_adapted(dense, tmp_path / "a", linears=("q_proj",), rank=2)
    options: dict[str, Any] = {"kind": "ia3", "select": {"rule": "top-k", "k": 2}}
    second = make_adapted(dense, tmp_path / "b", linears=("v_proj",), **options)
    card, told = both_texts(joined(first, second, tmp_path / "both"))
    assert "4 LoRA of rank 2 per linear or 4 vectors that scale, per linear on 4 linears" in card
    assert "(soft)" in card
    assert "(top-k k=2)" in card
    assert "4 LoRA of rank 2 on 4 linears" in told
    assert "(the first of 2 kinds, the first of 2 ways to weigh them)" in told


def test_more_kinds_than_two_are_counted(dense: Path, tmp_path: Path) -> None:
    made = make_adapted(dense, tmp_path / "a", linears=("q_proj",), rank=2)
    for number, (name, count) in enumerate({"k_proj": 2, "v_proj": 3}.items()):
        other = make_adapted(
            dense, tmp_path / name, linears=(name,), rank=number + 3, experts=count
        )
        made = joined(made, other, tmp_path / f"{number}")
    card, told = both_texts(made)
    assert card.startswith("4 LoRA of rank 2 to 4 per linear or one of 2 other kinds on 6 linears")
    assert "(the first of 3 kinds)" in told


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"peft_type": "LORA", "r": 8}, "one LoRA of rank 8"),
        (
            {"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 4, "x": 16}},
            "one LoRA of rank 4 to 16",
        ),
        ({"peft_type": "LORA", "r": 8, "rank_pattern": {}}, "one LoRA of rank 8"),
        ({"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": [4]}}, "one LoRA of rank 8"),
        (
            {"peft_type": "MOLORA", "num_experts": 4, "r": 3, "rank_pattern": {"q_proj": 5}},
            "4 LoRA of rank 3 to 5 per linear",
        ),
        (
            {"peft_type": "MOLORA", "num_experts": 4, "r": 3, "share": "a"},
            "4 LoRA of rank 3 per linear that share A",
        ),
    ],
)
def test_ranks_of_a_folder(config: dict[str, Any], wanted: str) -> None:
    assert words(config) == wanted


def test_inspect_names_the_ranks_of_a_stock_lora(dense: Path, tmp_path: Path) -> None:
    folder = make_lora(dense, tmp_path / "lora", r=4, rank_pattern={"v_proj": 7})
    assert "1 LoRA of rank 4 to 7 on 4 linears" in adaconvert.inspect(folder).lines()[0]


def facts_with_places(folder: Path, result: Path) -> dict[str, Any]:
    """Return the facts of what is made of an adapter folder, as its view gives them."""
    with viewed(folder) as view:
        places = (view.adapters.source.root, view.base.source.root)
        assert facts_of([Source.open(view.root)], result)["license"] == {}
        return facts_of([Source.open(view.root)], result, places=places)


def folder_with(dense: Path, folder: Path, front: str, **changes: object) -> Path:
    """Return a copy of the base in `folder`, and a stock LoRA of it that has a card."""
    made = make_lora(dense, folder)
    if front:
        (made / "README.md").write_text(front)
    else:
        (made / "README.md").unlink(missing_ok=True)
    config = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return made


def test_licence_and_bases_of_an_adapter_folder_are_kept(dense: Path, tmp_path: Path) -> None:
    folder = folder_with(dense, tmp_path / "lora", FRONT)
    found = facts_with_places(folder, dense)
    assert found["license"] == {"license": "mit"}
    assert found["base_models"] == ["org/base"]


def test_what_the_folder_does_not_tell_its_base_does(dense: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(dense, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/first\n---\n")
    found = facts_with_places(folder_with(base, tmp_path / "lora", ""), dense)
    assert found["license"] == {"license": "apache-2.0"}
    assert found["base_models"] == ["org/first"]


def test_the_base_a_folder_names_by_its_hub_id(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(dense, tmp_path / "lora", "", base_model_name_or_path="org/named")
    source = Source.open(dense)
    assert facts_of([source], dense, places=(folder,))["base_models"] == ["org/named"]
    # a folder of that name is no repository
    (tmp_path / "org" / "named").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert facts_of([source], dense, places=(folder,))["base_models"] == []


def test_a_card_of_a_checkpoint_tells_for_itself(dense: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(dense, tmp_path / "own"))
    (made / "README.md").write_text(FRONT)
    found = facts_of([Source.open(made)], made)
    assert (found["license"], found["base_models"]) == ({"license": "mit"}, ["org/base"])


@pytest.mark.parametrize("form", ["standalone", "as_plain_lora"])
def test_another_form_of_adapters_keeps_licence_and_bases(
    dense: Path, tmp_path: Path, form: str
) -> None:
    folder = folder_with(dense, tmp_path / "lora", FRONT)
    made = adaconvert.convert(
        folder, method="molora", destination=tmp_path / "made", verify=False, **{form: True}
    ).destination
    front = (made / "README.md").read_text().split("---")[1]
    assert "license: mit" in front
    assert "org/base" in front


def test_a_folder_of_a_classifier_names_the_class_with_its_head() -> None:
    mapped = {"base_model_class": "BertForSequenceClassification", "parent_library": "x"}
    assert auto_class({"auto_mapping": mapped}) == "BertForSequenceClassification"
    assert auto_class({"auto_mapping": {"base_model_class": "a b"}}) == "AutoModel"
