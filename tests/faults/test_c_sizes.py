"""Group C, row 8: config values that are no sizes, or nonsense, are refused by name."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaconvert.arch import registry
from adaconvert.errors import SourceError
from adaconvert.testing.faults import (
    refused,
    write_dense,
)
from adaconvert.testing.tiny_models import config_values

FAMILIES = registry.supported()


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (-8, "-8"),
        (0, "0"),
        (8.0, "8.0"),
        (1e9, "1000000000.0"),
        (True, "True"),
        ("8", "'8'"),
        (None, "null or no value"),
        ([8], "[8]"),
        ({"a": 8}, "{'a': 8}"),
    ],
)
def test_c8_sizes_that_are_none(tmp_path: Path, key: str, value: object, found: str) -> None:
    assert refused(write_dense(tmp_path, **{key: value})) == (
        f"config.json: {key} is not usable; expected a whole number of at least 1, found {found}"
    )


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("num_hidden_layers", 10**7, 4096),
        ("hidden_size", 10**9, 2**24),
        ("vocab_size", 2**63, 2**24),
        ("intermediate_size", 10**100, 2**24),
    ],
)
def test_c8_absurd_sizes(tmp_path: Path, key: str, value: int, limit: int) -> None:
    assert refused(write_dense(tmp_path, **{key: value})) == (
        f"config.json: {key} is larger than any model's; expected at most {limit}, found {value}"
    )


NONSENSE: dict[str, tuple[object, ...]] = {
    "size": (-(10**9), 2.5, "8", True, {"a": 1}, [8], float("inf"), 10**30),
    "count": (-(10**9), 2.5, "8", True, {"a": 1}, [8], float("inf"), 10**30),
    "flag": (0, 1, 2.5, "true", {"a": 1}, [True]),
    "number": ("8", True, {"a": 1}, [2.5], float("nan"), float("inf"), 10**30),
    "text": (8, 2.5, True, {"a": 1}, ["silu"]),
    "list": (8, "8", True, {"a": 1}, [2.5], [True], [[1]]),
    "labels": (-1, 0, 2.5, "8", True, ["a"]),
    "side": (-8, 0, 2.5, "8", True, {"a": 1}, [8, 4], [8, 8, 8], [], [8.0]),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_c8_no_key_of_any_family_lets_nonsense_through(model_type: str) -> None:
    started = time.perf_counter()
    good = {"model_type": model_type, **config_values(model_type)}
    keys = [key for key in registry.FAMILIES[model_type].keys.values() if key.name]
    for key in keys:
        for value in NONSENSE[key.kind]:
            with pytest.raises(SourceError, match=rf"config\.json: {key.name} is "):
                registry.describe(good | dict.fromkeys((key.name, *key.aliases), value))
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoe"])
def test_c8_as_many_experts_as_would_fill_the_memory(model_type: str) -> None:
    key = registry.FAMILIES[model_type].keys["experts"].name
    config: dict[str, object] = {"model_type": model_type, "num_hidden_layers": 4096, key: 65536}
    tracemalloc.start()
    try:
        if model_type == "granitemoe":
            # fused on disk: three tensors a layer, however many experts
            assert registry.describe(config).num_experts == 65536
        else:
            with pytest.raises(SourceError, match=rf"{key}=65536: more tensors than any model"):
                registry.describe(config)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": "big"}, "rope_theta is not usable; expected a number above 0"),
        ({"rope_theta": 0}, "rope_theta is not usable; expected a number above 0, found 0"),
        ({"rope_scaling": [8]}, "rope_scaling is not usable; expected an object, found [8]"),
        ({"rope_scaling": {"type": 1}}, "rope_type is not usable; expected a text, found 1"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is not usable; expected a finite number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is not usable; expected true or"),
        ({"hidden_act": None}, "hidden_act is not usable; expected a text, found null"),
        ({"attention_bias": 1}, "attention_bias is not usable; expected true or false, found 1"),
    ],
)
def test_c8_other_values(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    assert refused(write_dense(tmp_path, **changes)).startswith(f"config.json: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types does not have one entry per layer"),
        ({"layer_types": "full_attention"}, "layer_types is not usable; expected a list of"),
        ({"layer_types": ["conv", "conv"]}, "layer_types is not usable; expected a list of"),
        (
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types names sliding attention, but no sliding window is set",
        ),
    ],
)
def test_c8_layer_lists(changes: dict[str, object], message: str) -> None:
    config = {"model_type": "qwen2", "num_hidden_layers": 2, **changes}
    with pytest.raises(SourceError, match=rf"config\.json: {message}"):
        registry.describe(config)


def test_c8_more_experts_per_token_than_there_are() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}
    with pytest.raises(SourceError, match=r"\(num_local_experts=4, num_experts_per_tok=5\)"):
        registry.describe(config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, object]:
    """Return a small good config with up to three keys of its family replaced by any JSON."""
    family = registry.FAMILIES[draw(st.sampled_from(FAMILIES))]
    extra = ["rope_scaling", "rope_parameters", "rope_theta", "layer_types", "architectures"]
    lists = [mask.key for mask in family.masks.values() if mask.key]
    names = sorted({key.name for key in family.keys.values() if key.name} | {*extra, *lists})
    layers = family.keys["layers"].name
    config: dict[str, object] = {"model_type": family.model_type, layers: 2}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        config[name] = draw(JSON)
    return config


@given(configs())
def test_c8_any_json_is_understood_or_refused(config: dict[str, object]) -> None:
    message = ""
    try:
        spec = registry.describe(config)
    except SourceError as error:
        message = str(error)
    else:
        assert all(size >= 0 for tensor in spec.tensors for size in tensor.shape)
    assert message.isascii()
    assert len(message) < 1000
