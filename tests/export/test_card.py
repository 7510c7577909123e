"""The model card says what was proven, what was not, and how to switch the balance loss on."""

from __future__ import annotations

from pathlib import Path

import pytest

import adaconvert
from adaconvert.export.card import MARKER
from adaconvert.testing.hub_cache import build_hub_cache
from adaconvert.testing.tiny_models import make


def card_of(tmp_path: Path, **options: object) -> str:
    source = tmp_path / "dense"
    if not source.exists():
        make("llama", source)
    adaconvert.convert(source, destination=tmp_path / "out", **{"experts": 4, **options})
    return (tmp_path / "out" / "README.md").read_text()


def test_a_verified_card_carries_the_numbers(tmp_path: Path) -> None:
    text = card_of(tmp_path)
    assert MARKER in text
    assert "**Class: exact.**" in text
    assert "promise: exact (at most 1e-05 of the largest logit)" in text
    assert "same most likely next token: 100 % of tokens" in text
    assert "output_router_logits=True" in text
    assert "router_aux_loss_coef is 0.01" in text
    assert "| vllm |" in text


def test_an_unverified_card_says_so(tmp_path: Path) -> None:
    assert "**Not verified**" in card_of(tmp_path, verify=False)


def test_no_path_of_this_machine_is_in_any_text_file(tmp_path: Path) -> None:
    card_of(tmp_path, verify=False)
    for file in (tmp_path / "out").iterdir():
        if file.suffix in {".md", ".json"}:
            assert str(tmp_path) not in file.read_text(), file.name


@pytest.mark.parametrize(
    ("front", "want"),
    [
        ("license: apache-2.0\ntags:\n- x", "license: apache-2.0"),
        (
            "license: other\nlicense_name: gemma\nlicense_link: https://ai.google.dev/x",
            "license_name: gemma",
        ),
        ("license: !!python/object:os.system", None),
    ],
)
def test_the_license_is_carried_over(tmp_path: Path, front: str, want: str | None) -> None:
    source = make("llama", tmp_path / "dense")
    (source / "README.md").write_text(f"---\n{front}\n---\n# dense\n")
    text = card_of(tmp_path, verify=False)
    if want is None:
        assert "license" not in text.split("---")[1]
    else:
        assert want in text.split("---")[1]


def test_a_hub_source_becomes_the_base_model(tmp_path: Path) -> None:
    dense = make("llama", tmp_path / "dense")
    snapshot = build_hub_cache(tmp_path / "hub", "org/tiny", dense)
    adaconvert.convert(snapshot, destination=tmp_path / "out", experts=4, verify=False)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/tiny\nbase_model_relation: finetune" in text
