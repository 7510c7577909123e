"""Group C of the fault catalogue, the rows that concern files and names rather than sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaconvert.io.aux_files import classify
from adaconvert.io.source import Source
from adaconvert.testing.faults import (
    DENSE_CONFIG,
    Stored,
    dense_tensors,
    refusal,
    shard_bytes,
    write_config,
    write_dense,
)

CONFIG = "config.json"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "file is missing"),
        (b"", "is not valid JSON"),
        (b'{"model_type": "llama",}', "is not valid JSON"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "duplicate key 'model_type'"),
        (b'{"rms_norm_eps": Infinity}', "is not valid JSON; found the number Infinity"),
        ('{"model_type": "llama"}'.encode("utf-16"), "is not UTF-8 text; found UTF-16"),
        (b'{"model_type": "\xe9"}', "is not UTF-8 text; found byte 0xe9 at offset 16"),
        (b"[]", "is not a JSON object; expected an object, found an array"),
        (b"{" * 100_000, "is not valid JSON"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b" " * 16_000_001, "is too large to be read; expected at most 16000000 bytes"),
    ],
)
def test_c1_config_that_is_none(tmp_path: Path, raw: bytes | None, message: str) -> None:
    write_dense(tmp_path)
    (tmp_path / CONFIG).unlink()
    if raw is not None:
        (tmp_path / CONFIG).write_bytes(raw)
    assert refusal(tmp_path).startswith(f"{CONFIG}: {message}")


def test_c1_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = write_dense(tmp_path) / CONFIG
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Source.open(tmp_path).config == DENSE_CONFIG


@pytest.mark.parametrize(
    ("value", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "an unnamed method"),
        ("x\x1b[2J", "an unnamed method"),
        ({"quant_method": "x\x1b[2J"}, "x\\x1b[2J"),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_c11_quantised(tmp_path: Path, key: str, value: object, method: str) -> None:
    write_dense(tmp_path, **{key: value})
    assert refusal(tmp_path) == (
        f"config.json: {key}: the checkpoint is quantised with {method}. "
        "Dequantise it first, or start from the original float checkpoint."
    )


@pytest.mark.parametrize("value", [None, {}])
def test_c11_an_empty_quantisation_is_none(tmp_path: Path, value: object) -> None:
    Source.open(write_dense(tmp_path, quantization_config=value))


@pytest.mark.parametrize("suffix", ["qweight", "weight_packed", "SCB", "weight.absmax"])
def test_c11_quantised_without_saying_so(tmp_path: Path, suffix: str) -> None:
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    packed: dict[str, Stored] = {name: ("I32", (2,), bytes(8))}
    write_dense(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(dense_tensors() | packed))
    assert refusal(tmp_path).startswith(
        f"model.safetensors: tensor '{name}': the checkpoint is quantised, as this name shows"
    )


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_c13_only_an_adapter(tmp_path: Path, weights: str) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / weights).write_bytes(shard_bytes({"base_model.model.x.lora_A.weight": dense()}))
    assert refusal(tmp_path) == (
        "adapter_config.json: the folder holds only adapters. "
        "Merge a LoRA first (in peft: merge_and_unload, then save_pretrained); "
        "`adaconvert molora FOLDER DST --standalone` writes adapters with their model."
    )


def dense() -> Stored:
    """Return some tensor."""
    return dense_tensors()["model.norm.weight"]


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("base_model.model.", "a peft model saved unmerged: call merge_and_unload"),
        ("module.", "a model saved inside DataParallel or DDP: save model.module instead"),
        ("_orig_mod.", "a model saved inside torch.compile: save model._orig_mod instead"),
    ],
)
def test_c14_wrapped_names(tmp_path: Path, prefix: str, reason: str) -> None:
    write_dense(tmp_path)
    wrapped = {f"{prefix}{name}": tensor for name, tensor in dense_tensors().items()}
    (tmp_path / "model.safetensors").write_bytes(shard_bytes(wrapped))
    message = refusal(tmp_path)
    assert message.startswith(
        f"model.safetensors: tensor '{prefix}model.embed_tokens.weight': name starts with "
        f"'{prefix}', as in {reason}"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation", "org/evil-kernel"),
        ("attn_implementation", "org/evil-kernel"),
        ("_attn_implementation_internal", "org/evil-kernel"),
        ("experts_implementation", "org/evil-kernel"),
        ("_experts_implementation", "org/evil-kernel"),
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}),
        ("auto_map", {"AutoModelForCausalLM": "org/other--modeling_x.X"}),
        ("custom_pipelines", {"x": {"impl": "pipe.X"}}),
        ("trust_remote_code", True),
    ],
)
def test_c19_keys_that_could_load_code(tmp_path: Path, key: str, value: object) -> None:
    source = Source.open(write_dense(tmp_path, **{key: value}))
    assert source.config == DENSE_CONFIG
    assert source.notes == (f"config.json: dropped {key} (could load code)",)


def test_c19_keys_inside_other_keys(tmp_path: Path) -> None:
    nested = {"rope_parameters": {"rope_theta": 1.0, "auto_map": {}}}
    source = Source.open(write_dense(tmp_path, **nested))
    assert source.config["rope_parameters"] == {"rope_theta": 1.0}
    assert source.notes == ("config.json: dropped rope_parameters.auto_map (could load code)",)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hf_token", "anything"),
        ("use_auth_token", True),
        ("remark", "hf_CANARYCANARYCANARYCANARY"),
        ("author", "jane.doe@example.org"),
        ("_name_or_path", "/home/jane/model"),
        ("data", "/home/jane/data"),
        ("data", "~/data"),
        ("data", "C:\\Users\\jane"),
        ("data", "file:///home/jane"),
    ],
)
def test_c20_private_keys(tmp_path: Path, key: str, value: object) -> None:
    source = Source.open(write_dense(tmp_path, **{key: value}))
    assert source.config == DENSE_CONFIG
    assert source.notes == (f"config.json: dropped {key} (private to the machine it was made on)",)


def test_c20_ordinary_keys_are_kept(tmp_path: Path) -> None:
    keys: dict[str, object] = {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
        "num_experts_per_tok": 2,
        "transformers_version": "5.17.0",
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "layer_types": ["full_attention", "sliding_attention"],
        "model_name": "org/name",
    }
    source = Source.open(write_dense(tmp_path, **keys))
    assert source.config == DENSE_CONFIG | keys
    assert source.notes == ()


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config"])
def test_c21_nested_models(tmp_path: Path, key: str) -> None:
    write_dense(tmp_path, model_type="llava\n", **{key: dict(DENSE_CONFIG)})
    message = refusal(tmp_path)
    assert message.startswith(
        f"config.json: {key}: model_type 'llava\\n' wraps a language model with other parts: "
        "not supported; expected the config of one plain model"
    )


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ('{"temperature": NaN}', "is not usable: is not valid JSON"),
        ("[]", "is not usable: is not a JSON object"),
        (
            '{"custom_generate": "org/evil\\u001b"}',
            "asks for code: custom_generate is 'org/evil\\x1b'",
        ),
    ],
)
def test_c23_generation_config_that_is_not_copied(tmp_path: Path, raw: str, reason: str) -> None:
    (write_dense(tmp_path) / "generation_config.json").write_text(raw)
    side = classify(Source.open(tmp_path))
    assert side.copied == ()
    assert side.dropped == {"generation_config.json": reason}


def test_c23_a_good_generation_config_is_copied(tmp_path: Path) -> None:
    (write_dense(tmp_path) / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert classify(Source.open(tmp_path)).copied == ("generation_config.json",)


def test_notes_escape_hostile_keys(tmp_path: Path) -> None:
    write_dense(tmp_path)
    write_config(tmp_path, **{"x\x1b[2J": "/home/jane", "y" * 1000: "/home/jane"})
    (note,) = Source.open(tmp_path).notes
    assert note.isprintable()
    assert "x\\x1b[2J" in note
    assert "y" * 201 not in note
    assert "jane" not in note
