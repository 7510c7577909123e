"""What `molora` refuses, by the name of the option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.errors import AdaconvertError, OptionError, SourceError
from adaconvert.methods.molora.config import MoloraOptions
from adaconvert.testing.tiny_models import make


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 0}, r"--rank: out of range"),
        ({"experts": 0}, r"--experts: out of range"),
        ({"k": 2}, r"--k: does nothing with --routing soft"),
        ({"routing": "topp", "p": 0.0}, r"--p: out of range; expected above 0"),
        ({"routing": "topk", "k": 3, "experts": 2}, r"--k: out of range; expected 1 to 2"),
        ({"routing": "arrow"}, r"arrow routes adapters that exist"),
        ({"routing": "uniform", "router": "shared"}, r"--router: does nothing with"),
        ({"experts_kind": "ia3", "rank": 2}, r"--rank: does nothing with --experts-kind ia3"),
        ({"standalone": True, "as_moe": True}, r"--standalone --as-moe: one result"),
        ({"adapters": ("a",), "rank": 2}, r"--rank: does nothing with --from"),
        ({"subtract_mean": True}, r"--subtract-mean: does nothing with no --from"),
        ({"adapters": ("a",), "routing": "phatgoose"}, r"--data: phatgoose trains"),
    ],
)
def test_options_that_mean_nothing(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        MoloraOptions(**given)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("dense") / "base")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("q_porj", r"'q_porj' is the end of no linear's path.*Did you mean q_proj"),
        ("lm_head", r"'lm_head' is a head, outside the blocks"),
        ("embed_tokens", r"'embed_tokens' is no linear"),
        (r"nothing\d+", r"matches the path of no linear"),
        ("(", r"is no regular expression"),
    ],
)
def test_targets_that_are_none(wanted: str, words: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"--target-modules: .*{words}"):
        api.plan(dense, method="molora", target_modules=wanted)


def test_experts_of_a_mixture_get_no_adapters(tmp_path: Path) -> None:
    source = make("mixtral", tmp_path / "mixture")
    with pytest.raises(OptionError, match=r"'w1' is in the experts of a mixture"):
        api.plan(source, method="molora", target_modules="w1")


def test_another_base_is_told(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    api.convert(dense, destination=folder, method="molora", rank=2)
    other = make("llama", tmp_path / "other", seed=5)
    given: dict[str, Any] = {"method": "molora", "base": str(other), "standalone": True}
    with pytest.raises(SourceError, match="made for another base"):
        api.convert(folder, destination=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_source_with_adapters_keeps_them(dense: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    api.convert(dense, destination=whole, method="molora", rank=2, standalone=True)
    with pytest.raises(OptionError, match=r"--rank: does nothing: the source has adapters"):
        api.plan(whole, method="molora", rank=4, standalone=True)
    with pytest.raises(OptionError, match=r"--base: is needed"):
        api.plan(whole, method="molora")


def test_scales_are_no_low_rank(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    api.convert(dense, destination=folder, method="molora", experts_kind="ia3")
    for form in ("as_plain_lora", "as_moe"):
        given: dict[str, Any] = {form: True}
        with pytest.raises(AdaconvertError, match="vectors that scale"):
            api.plan(folder, method="molora", **given)


def test_a_mixture_needs_adapters_where_its_experts_are(dense: Path) -> None:
    with pytest.raises(SourceError, match="no adapters are on feed-forward networks"):
        api.plan(dense, method="molora", target_modules="q_proj", as_moe=True)
