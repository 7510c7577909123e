"""Group C, config against tensors: contradictions are found before a weight is read, and named."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaconvert.arch import registry
from adaconvert.errors import SourceError
from adaconvert.methods.sources import check_ties, open_source
from adaconvert.testing.faults import (
    DENSE_CONFIG,
    Stored,
    dense_tensors,
    floats,
    shard_bytes,
    tree_state,
    write_config,
    write_dense,
)
from adaconvert.testing.tiny_models import config_values

FAMILIES = registry.supported()


def write_tensors(folder: Path, tensors: Mapping[str, Stored], **changes: object) -> Path:
    """Write a checkpoint of these tensors; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, **changes)
    (folder / "model.safetensors").write_bytes(shard_bytes(tensors))
    return folder


def refused(folder: Path) -> str:
    """Return the message the folder is refused with; nothing on disk has changed."""
    before = tree_state(folder)
    with pytest.raises(SourceError) as caught:
        open_source(str(folder))
    assert tree_state(folder) == before
    message = str(caught.value)
    assert message.isascii()
    assert "\n" not in message
    return message


def test_c2_unknown_model_type(tmp_path: Path) -> None:
    message = refused(write_dense(tmp_path, model_type="lllama", architectures=None))
    assert message == (
        "config.json: model_type 'lllama' is not supported. Nearest: llama. "
        f"Supported: {', '.join(FAMILIES)}."
    )


def test_c2_known_to_transformers_but_not_to_us(tmp_path: Path) -> None:
    message = refused(write_dense(tmp_path, model_type="mamba2", architectures=None))
    assert message.startswith("config.json: model_type 'mamba2' is not supported.")


def test_c2_another_head(tmp_path: Path) -> None:
    name = "LlamaForSequenceClassification"
    assert refused(write_dense(tmp_path, architectures=[name])) == (
        f"config.json: architecture {name} is not supported: its head is not that of a causal "
        "language model. Supported for llama: LlamaForCausalLM."
    )


def test_c3_more_layers_in_the_config(tmp_path: Path) -> None:
    names = [name.replace("layers.0", "layers.2") for name in dense_tensors() if "layers.0" in name]
    assert refused(write_dense(tmp_path, num_hidden_layers=3)) == (
        f"config.json: 9 tensors ({', '.join(in_order(names)[:5])} and 4 more) that config.json "
        "implies are not stored. config.json says num_hidden_layers=3; the files hold 2 layers."
    )


def in_order(names: list[str]) -> list[str]:
    """Return names of one Llama block in the order of the family file."""
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    order = (*parts, "input_layernorm", "post_attention_layernorm")
    return sorted(names, key=lambda name: order.index(name.split(".")[-2]))


def test_c3_a_missing_tensor(tmp_path: Path) -> None:
    tensors = dense_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    assert refused(write_tensors(tmp_path, tensors)) == (
        "config.json: 1 tensor (model.layers.1.mlp.up_proj.weight) that config.json implies "
        "is not stored"
    )


def test_c4_fewer_layers_in_the_config(tmp_path: Path) -> None:
    message = refused(write_dense(tmp_path, num_hidden_layers=1))
    first = "model.layers.1.input_layernorm.weight"
    assert message.startswith(f"model.safetensors: 9 tensors ({first}, ")
    assert message.endswith(" and 4 more) are stored, but config.json says num_hidden_layers=1")


def test_c4_no_layers_in_the_config(tmp_path: Path) -> None:
    assert refused(write_dense(tmp_path, num_hidden_layers=0)) == (
        "config.json: num_hidden_layers is not usable; "
        "expected a whole number of at least 1, found 0"
    )


def test_c4_an_unknown_tensor(tmp_path: Path) -> None:
    tensors = dense_tensors() | {"model.layers.0.mlp.extra.weight": floats(2)}
    assert refused(write_tensors(tmp_path, tensors)) == (
        "model.safetensors: 1 tensor (model.layers.0.mlp.extra.weight) is stored "
        "that a LlamaForCausalLM does not have"
    )


def test_c5_width(tmp_path: Path) -> None:
    assert refused(write_dense(tmp_path, intermediate_size=16)) == (
        "model.safetensors: tensor 'model.layers.0.mlp.gate_proj.weight': shape, as of 5 "
        "more, does not fit config.json; "
        "expected [16, 8] (intermediate_size=16), found [12, 8]"
    )


def test_c6_vocabulary_padded_in_the_files(tmp_path: Path) -> None:
    assert refused(write_dense(tmp_path, vocab_size=13)) == (
        "model.safetensors: tensor 'model.embed_tokens.weight': shape, as of 1 more, does not fit "
        "config.json; expected [13, 8] (vocab_size=13), found [16, 8]. "
        "The vocabulary seems padded in the files only; "
        "if the files are right, set vocab_size to 16 in config.json."
    )


def test_c6_vocabulary_padded_in_the_config(tmp_path: Path) -> None:
    message = refused(write_dense(tmp_path, vocab_size=32))
    assert "expected [32, 8] (vocab_size=32), found [16, 8]" in message
    assert "The vocabulary seems padded in config.json only" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3},
            "8 is not a multiple of 3 (hidden_size=8, num_attention_heads=3)",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "4 is not a multiple of 3 (num_attention_heads=4, num_key_value_heads=3)",
        ),
        (
            {"num_attention_heads": 2, "num_key_value_heads": 4},
            "2 is not a multiple of 4 (num_attention_heads=2, num_key_value_heads=4)",
        ),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4},
            "8 is not a multiple of 3 (hidden_size=8, num_attention_heads=3)",
        ),
    ],
)
def test_c7_heads_that_do_not_divide(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    assert refused(write_dense(tmp_path, **changes)) == f"config.json: {message}"


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


def tied(folder: Path, head: Stored | None) -> Path:
    """Write a tied checkpoint that stores a head all the same."""
    tensors = dense_tensors()
    del tensors["lm_head.weight"]
    if head is not None:
        tensors["lm_head.weight"] = head
    return write_tensors(folder, tensors, tie_word_embeddings=True)


def test_c9_tied_but_another_head_is_stored(tmp_path: Path) -> None:
    folder = tied(tmp_path, dense_tensors()["lm_head.weight"])
    with pytest.raises(SourceError, match=r"tie_word_embeddings is true, yet .*differs from"):
        check_ties(open_source(str(folder)))


def test_c9_tied_and_the_same_head_is_stored(tmp_path: Path) -> None:
    described = open_source(str(tied(tmp_path, dense_tensors()["model.embed_tokens.weight"])))
    check_ties(described)
    assert described.audit.dropped == {
        "lm_head.weight": "tied: same bytes as model.embed_tokens.weight"
    }


def test_c9_tied_and_no_head_is_stored(tmp_path: Path) -> None:
    described = open_source(str(tied(tmp_path, None)))
    assert (described.audit.compare_ties, described.audit.dropped) == ((), {})


def test_c10_untied_and_no_head(tmp_path: Path) -> None:
    tensors = dense_tensors()
    del tensors["lm_head.weight"]
    assert refused(write_tensors(tmp_path, tensors)) == (
        "config.json: tie_word_embeddings is false, but no lm_head.weight is stored. "
        "Set tie_word_embeddings to true if the head is the embedding."
    )


def test_c15_legacy_buffers_are_dropped_with_a_reason(tmp_path: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    described = open_source(str(write_tensors(tmp_path, dense_tensors() | {buffer: floats(2)})))
    assert described.audit.dropped == {buffer: "rotary buffer, computed from config.json"}
    assert buffer not in described.audit.used


def test_c16_the_files_decide_the_dtype(tmp_path: Path) -> None:
    described = open_source(str(write_dense(tmp_path, torch_dtype="bfloat16")))
    assert described.audit.notes == (
        "config.json says bfloat16, the files hold F32; the files decide",
    )


def test_c16_mixed_dtypes(tmp_path: Path) -> None:
    tensors = dense_tensors() | {"model.norm.weight": ("F16", (8,), bytes(16))}
    described = open_source(str(write_tensors(tmp_path, tensors)))
    assert described.audit.notes == (
        "tensors have mixed dtypes (20 in F32, 1 in F16); each keeps its own",
    )


@pytest.mark.parametrize(("dtype", "width"), [("I8", 1), ("U8", 1), ("I32", 4), ("I64", 8)])
def test_c17_whole_numbers_where_floats_belong(tmp_path: Path, dtype: str, width: int) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = dense_tensors() | {name: (dtype, (8, 12), bytes(96 * width))}
    assert refused(write_tensors(tmp_path, tensors)) == (
        f"model.safetensors: tensor '{name}': dtype {dtype} is no float, so the weights are "
        "quantised or damaged; expected F64 or F32 or F16 or BF16. "
        "Start from the checkpoint in full precision."
    )


def test_the_checkpoint_the_faults_are_made_from_is_good(tmp_path: Path) -> None:
    described = open_source(str(write_dense(tmp_path)))
    assert sorted(described.audit.used) == sorted(dense_tensors())
    assert described.audit.notes == ()
    assert json.loads((tmp_path / "config.json").read_text()) == DENSE_CONFIG
