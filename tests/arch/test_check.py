"""What the audit of a checkpoint accepts, drops and says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from adaconvert.arch import registry
from adaconvert.arch.base import ModelSpec
from adaconvert.arch.check import audit
from adaconvert.errors import SourceError

CONFIG: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


@dataclass
class Ref:
    """A stored tensor, as the audit sees it."""

    dtype: str
    shape: tuple[int, ...]


def stored_for(spec: ModelSpec, dtype: str = "F32") -> dict[str, Ref]:
    return {t.name: Ref(dtype, t.shape) for t in spec.tensors if not t.optional}


def llama(**changes: object) -> tuple[ModelSpec, dict[str, Ref]]:
    spec = registry.describe(CONFIG | changes)
    return spec, stored_for(spec)


def test_a_complete_checkpoint_is_used_whole_and_in_order() -> None:
    spec, stored = llama()
    audited = audit(spec, dict(reversed(stored.items())))
    assert audited.used == tuple(tensor.name for tensor in spec.tensors)
    assert (audited.dropped, audited.compare_ties, audited.notes) == ({}, (), ())


def test_a_tied_head_that_is_stored_is_left_to_compare() -> None:
    spec, stored = llama(tie_word_embeddings=True)
    stored["lm_head.weight"] = Ref("F32", (320, 32))
    audited = audit(spec, stored)
    assert audited.compare_ties == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert audited.dropped == {"lm_head.weight": "tied: same bytes as model.embed_tokens.weight"}
    assert "lm_head.weight" not in audited.used


def test_rotary_buffers_are_dropped_with_a_reason() -> None:
    spec, stored = llama()
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    audited = audit(spec, stored | {name: Ref("F32", (4,)) for name in names})
    assert audited.dropped == dict.fromkeys(names, "rotary buffer, computed from config.json")


def test_a_buffer_may_have_any_dtype() -> None:
    spec = registry.describe({"model_type": "gpt_neox", "num_hidden_layers": 1})
    mask = {"gpt_neox.layers.0.attention.bias": Ref("BOOL", (1, 1, 8, 8))}
    assert list(audit(spec, stored_for(spec) | mask).dropped) == list(mask)


def test_five_missing_names_are_given_and_the_rest_counted() -> None:
    spec, stored = llama()
    gone = [name for name in stored if "layers.1." in name]
    for name in gone:
        del stored[name]
    message = (
        r"config\.json: 9 tensors \((model\.layers\.1\.\S+, ){4}model\.layers\.1\.\S+ and 4 more\) "
        r"that config\.json implies are not stored"
    )
    with pytest.raises(SourceError, match=message):
        audit(spec, stored)


def test_one_missing_name_is_singular() -> None:
    spec, stored = llama()
    del stored["model.norm.weight"]
    with pytest.raises(
        SourceError, match=r"1 tensor \(model\.norm\.weight\) that .* is not stored"
    ):
        audit(spec, stored)


def test_missing_names_are_held_against_the_unknown_ones() -> None:
    spec, stored = llama()
    stored = {name.removeprefix("model."): ref for name, ref in stored.items()}
    with pytest.raises(
        SourceError, match=r"Stored instead: 38 tensors \(embed_tokens\.weight, .*un"
    ):
        audit(spec, stored)


def test_the_number_of_layers_in_the_files_is_told() -> None:
    spec, stored = llama()
    stored = {n: r for n, r in stored.items() if "layers.2." not in n and "layers.3." not in n}
    with pytest.raises(SourceError, match=r"num_hidden_layers=4; the files hold 2 layers"):
        audit(spec, stored)


def test_layers_beyond_the_config_are_refused() -> None:
    _, stored = llama()
    spec, _ = llama(num_hidden_layers=3)
    with pytest.raises(SourceError, match=r"9 tensors .* are stored, but .* num_hidden_layers=3"):
        audit(spec, stored)


def test_experts_beyond_the_config_are_refused() -> None:
    config = CONFIG | {"model_type": "mixtral", "num_local_experts": 4}
    stored = stored_for(registry.describe(config))
    spec = registry.describe(config | {"num_local_experts": 3})
    with pytest.raises(SourceError, match=r"12 tensors .*experts\.3\.w1.* num_local_experts=3"):
        audit(spec, stored)


def test_biases_the_config_switches_off_are_refused_with_the_key() -> None:
    _, stored = llama(attention_bias=True)
    spec, _ = llama()
    with pytest.raises(SourceError, match=r"16 tensors .*q_proj\.bias.*says attention_bias=false"):
        audit(spec, stored)


def test_a_dense_ffn_in_a_sparse_layer_is_refused_with_the_keys() -> None:
    config = CONFIG | {"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1}
    stored = stored_for(registry.describe(config | {"mlp_only_layers": [1]}))
    spec = registry.describe(config)
    stored |= stored_for(spec)
    with pytest.raises(
        SourceError, match=r"3 tensors \(model\.layers\.1\.mlp\.\S+.*mlp_only_layers"
    ):
        audit(spec, stored)


def test_a_tensor_of_no_family_member_is_refused() -> None:
    spec, stored = llama()
    stored["model.vision_tower.weight\x1b[2J"] = Ref("F32", (1,))
    message = (
        r"1 tensor \(model\.vision_tower\.weight\\x1b\[2J\) is stored that a Llama\w+ does not"
    )
    with pytest.raises(SourceError, match=message):
        audit(spec, stored)


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "I64", "BOOL"])
def test_whole_number_weights_are_refused(dtype: str) -> None:
    spec, stored = llama()
    stored["model.norm.weight"] = Ref(dtype, (32,))
    message = (
        rf"tensor 'model\.norm\.weight': dtype {dtype} is no float.*expected F64 or F32 or F16"
    )
    with pytest.raises(SourceError, match=message):
        audit(spec, stored)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_8_bit_floats_are_refused(dtype: str) -> None:
    spec, stored = llama()
    stored["model.norm.weight"] = Ref(dtype, (32,))
    with pytest.raises(
        SourceError, match=f"dtype {dtype} is 8-bit float, so the weights are quant"
    ):
        audit(spec, stored)


@pytest.mark.parametrize(
    ("key", "value", "name", "expected"),
    [
        (
            "intermediate_size",
            48,
            "layers.0.mlp.gate_proj.weight",
            "[48, 32] (intermediate_size=48)",
        ),
        ("num_key_value_heads", 4, "k_proj.weight", "[32, 32] (num_key_value_heads=4, head_dim=8)"),
        ("head_dim", 16, "q_proj.weight", "[64, 32] (num_attention_heads=4, head_dim=16)"),
        ("vocab_size", 300, "embed_tokens.weight", "[300, 32] (vocab_size=300)"),
    ],
)
def test_a_size_that_does_not_fit_names_the_keys(
    key: str, value: int, name: str, expected: str
) -> None:
    _, stored = llama()
    spec, _ = llama(**{key: value})
    with pytest.raises(SourceError) as caught:
        audit(spec, stored)
    message = str(caught.value)
    assert f"{name}': shape, as of " in message
    assert (
        f"expected {expected}, found {list(stored[next(n for n in stored if name in n)].shape)}"
        in message
    )


def test_a_size_with_the_wrong_number_of_axes() -> None:
    spec, stored = llama()
    stored["model.norm.weight"] = Ref("F32", (1, 32))
    message = (
        r"': shape does not fit config\.json; expected \[32\] \(hidden_size=32\), found \[1, 32\]"
    )
    with pytest.raises(SourceError, match=message):
        audit(spec, stored)


def test_derived_sizes_are_explained_by_keys_of_the_config() -> None:
    spec = registry.describe({"model_type": "vit", "num_hidden_layers": 1})
    stored = stored_for(spec)
    stored["embeddings.position_embeddings"] = Ref("F32", (1, 577, 768))
    with pytest.raises(SourceError, match=r"\[1, 197, 768\] \(image_size=224, patch_size=16\)"):
        audit(spec, stored)


def test_mixed_dtypes_and_a_config_that_says_otherwise_are_noted() -> None:
    spec, stored = llama(torch_dtype="float16")
    stored = {name: Ref("BF16", ref.shape) for name, ref in stored.items()}
    stored["model.norm.weight"] = Ref("F32", (32,))
    assert audit(spec, stored).notes == (
        "tensors have mixed dtypes (38 in BF16, 1 in F32); each keeps its own",
        "config.json says float16, the files hold BF16, F32; the files decide",
    )


def test_a_dtype_in_the_config_that_one_of_the_tensors_has_is_no_note() -> None:
    spec, stored = llama(dtype="float32")
    assert audit(spec, stored).notes == ()
