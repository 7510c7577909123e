"""io.aux_files: what goes along with the weights, and what never does (B17, C23, E7, E8, G14)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from adaconvert.io.aux_files import classify, generation_config_fault


@dataclass(frozen=True)
class Folder:
    root: Path
    side_files: tuple[str, ...]

    def path(self, relative: str) -> Path:
        return self.root / relative


COPIED = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENCE.md",
    "license",
    "LICENSE-MODEL",
    "NOTICE",
    "USE_POLICY.md",
]

DROPPED = {
    "model.safetensors.index.json": "belongs to the source's shards",
    "pytorch_model.bin.index.json": "belongs to the source's shards",
    "config.json": "written anew",
    "README.md": "written anew",
    "adaconvert.json": "written anew",
    ".gitattributes": "belongs to the source's repository",
    "modeling_llama.py": "is code",
    "tokenization_custom.py": "is code",
    "training_args.bin": "is training state",
    "optimizer.pt": "is training state",
    "trainer_state.json": "is training state",
    "pytorch_model.bin": "may hold pickled objects",
    "consolidated.00.pth": "may hold pickled objects",
    "tokenizer.pkl": "may hold pickled objects",
    "model-q4.gguf": "holds other weights",
    "model.fp16.safetensors": "holds other weights",
    "flax_model.msgpack": "holds other weights",
    "figure.png": "is not a known part of a checkpoint",
    "generation_config.yaml": "is not a known part of a checkpoint",
    "tokenizer.json.bak": "is not a known part of a checkpoint",
    "xtokenizer.json": "is not a known part of a checkpoint",
    "LICENSED.json": "is not a known part of a checkpoint",
    "original/tokenizer.json": "lies in a nested folder",
    "tokenizer.json\n": "is not a known part of a checkpoint",
}


@pytest.mark.parametrize("name", COPIED)
def test_copied(tmp_path: Path, name: str) -> None:
    assert classify(Folder(tmp_path, (name,))).copied == (name,)


@pytest.mark.parametrize(("name", "reason"), DROPPED.items())
def test_dropped(tmp_path: Path, name: str, reason: str) -> None:
    found = classify(Folder(tmp_path, (name,)))
    assert found.copied == ()
    assert found.dropped == {name: reason}


def test_every_file_is_accounted_for_in_order(tmp_path: Path) -> None:
    names = (*reversed(COPIED), *reversed(DROPPED))
    found = classify(Folder(tmp_path, names))
    assert list(found.copied) == sorted(COPIED)
    assert list(found.dropped) == sorted(DROPPED)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"temperature": 0.6, "eos_token_id": [1, 2]}', None),
        ("{}", None),
        ('{"custom_generate": "org/repo"}', "asks for code: custom_generate is 'org/repo'"),
        ('{"custom_generate": "a\\u001bb"}', r"asks for code: custom_generate is 'a\x1bb'"),
        ("{", "is not usable: "),
        ("[1]", "is not usable: "),
        ('{"a": 1, "a": 2}', "is not usable: "),
        ("\x00\xff", "is not usable: "),
    ],
)
def test_c23_generation_config(tmp_path: Path, text: str, reason: str | None) -> None:
    (tmp_path / "generation_config.json").write_text(text, encoding="latin-1")
    found = classify(Folder(tmp_path, ("generation_config.json", "tokenizer.json")))
    if reason is None:
        assert found.copied == ("generation_config.json", "tokenizer.json")
        assert generation_config_fault(tmp_path / "generation_config.json") is None
    else:
        assert found.copied == ("tokenizer.json",)
        assert found.dropped["generation_config.json"].startswith(reason)


def test_c23_missing_generation_config(tmp_path: Path) -> None:
    found = classify(Folder(tmp_path, ("generation_config.json",)))
    assert found.dropped == {"generation_config.json": "is not usable: file is missing"}
