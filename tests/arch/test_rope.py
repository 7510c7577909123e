"""Rotary parameters in any spelling come out in every spelling."""

from __future__ import annotations

from typing import Any

import pytest

from adaconvert.arch import registry, rope
from adaconvert.arch.rope import RopeParameters
from adaconvert.testing.tiny_models import config_values

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def read(family: str, **config: Any) -> RopeParameters | None:
    values = {k: v for k, v in config_values(family, layers=4).items() if k not in config}
    return rope.read(registry.describe({"model_type": family, **values, **config}))


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
    ],
)
def test_both_spellings_are_read(spelling: dict[str, Any]) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_type"}
    expected = RopeParameters(theta=5e5, rope_type="llama3", scaling=scaling)
    assert read("llama", **spelling) == expected


@pytest.mark.parametrize(
    ("family", "theta"), [("llama", 1e4), ("qwen2", 1e4), ("gemma", 1e4), ("olmo2", 1e4)]
)
def test_a_config_without_a_base_means_the_base_of_its_family(family: str, theta: float) -> None:
    assert read(family) == RopeParameters(theta=theta)


def test_an_old_name_of_a_rule_is_renamed() -> None:
    for name in ("su", "yarn"):
        found = read("phi3", rope_scaling={"type": name, **LONG}, rope_theta=1e4)
        assert found is not None
        assert found.rope_type == "longrope"


def test_the_original_length_beside_the_rule_counts() -> None:
    found = read(
        "phi3", rope_scaling={"type": "longrope", **LONG}, original_max_position_embeddings=32
    )
    assert found is not None
    assert found.scaling["original_max_position_embeddings"] == 32
    written = rope.write(found, partial_key=False)
    assert written["original_max_position_embeddings"] == 32
    assert written["rope_scaling"] == {
        "rope_type": "longrope",
        **LONG,
        "original_max_position_embeddings": 32,
    }


def test_partial_rotary_is_read_and_written_only_where_the_host_knows_it() -> None:
    found = read("phi3", partial_rotary_factor=0.5)
    assert found == RopeParameters(theta=1e4, partial=0.5)
    assert rope.write(found, partial_key=True) == {
        "rope_theta": 1e4,
        "rope_scaling": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
        "partial_rotary_factor": 0.5,
    }
    whole = rope.write(RopeParameters(theta=1e4), partial_key=False)
    assert whole == {
        "rope_theta": 1e4,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }


@pytest.mark.parametrize("rule", [LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_a_rule_is_written_whole_in_both_spellings(rule: dict[str, Any]) -> None:
    found = read("llama", rope_parameters={**rule, "rope_theta": 7e4})
    assert found is not None
    written = rope.write(found, partial_key=False)
    assert written == {
        "rope_theta": 7e4,
        "rope_scaling": rule,
        "rope_parameters": {**rule, "rope_theta": 7e4},
    }


def test_nothing_is_added_to_what_the_source_states() -> None:
    """transformers 4 divides by an original length only when one is stated."""
    found = read("llama", rope_scaling={"type": "yarn", "factor": 4.0}, rope_theta=1e4)
    assert found is not None
    assert rope.write(found, partial_key=False)["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
    }


def test_layered_parameters_are_those_of_full_attention() -> None:
    full = {"rope_type": "default", "rope_theta": 5e5}
    found = read(
        "olmo3",
        layer_types=["full_attention"] * 4,
        rope_parameters={"full_attention": full, "sliding_attention": {"rope_type": "default"}},
    )
    assert found == RopeParameters(theta=5e5)


def test_a_model_without_rotary_positions_has_none() -> None:
    assert read("gpt2") is None
