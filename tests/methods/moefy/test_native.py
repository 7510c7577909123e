"""The stock form of a split: every expert runs behind a router of zeros, exact before training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adaconvert
from adaconvert.testing.tiny_models import make


@pytest.mark.parametrize(
    ("family", "host", "options", "kind"),
    [
        ("llama", "mixtral", {"split": "random"}, "exact"),
        ("llama", "mixtral", {"split": "contiguous"}, "exact"),
        ("llama-tied", "qwen3_moe", {"split": "random", "target": "mixtral"}, "exact"),
        ("qwen2", "qwen2_moe", {"split": "random"}, "exact"),
        ("qwen3", "qwen3_moe", {"split": "random", "layers": "1"}, "exact"),
        ("phi3", "mixtral", {"split": "random"}, "exact"),
        ("granite", "granitemoe", {"split": "random"}, "exact"),
        ("olmo", "mixtral", {"split": "random"}, "exact-fp32"),
        ("olmo2", "flex_olmo", {"split": "contiguous"}, "exact"),
    ],
)
def test_the_native_form_is_the_dense_model(
    family: str, host: str, options: dict[str, object], kind: str, tmp_path: Path
) -> None:
    host = str(options.get("target", host))
    source = make(family, tmp_path / "dense", dtype="bfloat16")
    made = adaconvert.convert(
        source, destination=tmp_path / "moe", method="moefy", native=True, num_experts=4, **options
    )
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (config["model_type"], config["num_experts_per_tok"]) == (host, 4)
    assert made.report.exactness.kind == kind
    verification = made.manifest["verification"]
    assert isinstance(verification, dict)
    assert verification["ok"] is True
    assert adaconvert.verify(source, tmp_path / "moe").ok
    assert not list((tmp_path / "moe").glob("*.py"))
    assert "stock" in (tmp_path / "moe" / "README.md").read_text()


def test_a_number_of_experts_that_is_no_power_of_two_rounds(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense", dtype="bfloat16", intermediate_size=48)
    plan = adaconvert.plan(source, method="moefy", native=True, num_experts=3)
    assert plan.exactness.kind == "exact-fp32"
