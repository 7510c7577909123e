"""Group C, config against tensors: contradictions are found before a weight is read, and named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from adaconvert.arch import registry
from adaconvert.errors import SourceError
from adaconvert.methods.sources import check_ties, open_source
from adaconvert.testing.faults import (
    DENSE_CONFIG,
    Stored,
    dense_tensors,
    floats,
    refused,
    shard_bytes,
    write_config,
    write_dense,
)

FAMILIES = registry.supported()


def write_tensors(folder: Path, tensors: Mapping[str, Stored], **changes: object) -> Path:
    """Write a checkpoint of these tensors; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, **changes)
    (folder / "model.safetensors").write_bytes(shard_bytes(tensors))
    return folder


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
