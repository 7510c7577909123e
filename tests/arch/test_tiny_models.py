"""The models other tests stand on: real, seeded, sharded, and lively enough to show mistakes."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaconvert.arch import registry
from adaconvert.testing import tiny_models
from adaconvert.testing.tiny_tokenizer import VOCAB

DECODERS = [name for name, family in registry.FAMILIES.items() if family.kind == "decoder"]
#: a vision model has no logits over tokens
VARIANTS = [name for name, (family, _) in tiny_models.VARIANTS.items() if family != "vit"]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", [*DECODERS, *VARIANTS])
def test_logits_are_finite_and_lively(name: str) -> None:
    family = tiny_models.VARIANTS.get(name, (name,))[0]
    model = tiny_models.build(family, tiny_models.config_values(name))
    tokens = torch.arange(24).reshape(2, 12) * 7 % VOCAB
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.shape == (2, 12, tiny_models.VOCAB)
    assert bool(logits.isfinite().all())
    assert 0.3 < logits.std().item() < 10
    # the model looks at its input, and at more than the last token
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 0.1
    with torch.no_grad():
        assert (model(tokens[:, 1:]).logits[:, -1] - logits[:, -1]).abs().max() > 1e-4


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    one = digests(tiny_models.make("llama", tmp_path / "one"))
    two = digests(tiny_models.make("llama", tmp_path / "two"))
    other = digests(tiny_models.make("llama", tmp_path / "other", seed=1))
    assert one == two
    assert {name for name in one if one[name] != other[name]} == {
        name for name in one if name.endswith(".safetensors")
    }


def test_files_are_sharded_readable_and_complete(tmp_path: Path) -> None:
    folder = tiny_models.make("qwen2", tmp_path / "model", dtype="bfloat16")
    names = {path.name for path in folder.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert {
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        "chat_template.jinja",
    } <= names
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_checkpoint_loads_as_it_was_made(tmp_path: Path) -> None:
    folder = tiny_models.make("llama-tied", tmp_path / "model", max_shard_size="1GB")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    made = tiny_models.build("llama", tiny_models.config_values("llama-tied"))
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, made(tokens).logits)
    assert model.generation_config.temperature == 0.7


def test_the_tokenizer_round_trips_and_knows_its_chat_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.make("llama", tmp_path / "model"))
    text = "Router, expert, Gewichte \u00e9 \U0001f600\n\tdef f():"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert max(ids) < len(tokenizer) <= VOCAB < tiny_models.VOCAB
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 0, 0)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
