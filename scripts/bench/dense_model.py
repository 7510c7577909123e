"""A Llama checkpoint with random weights, written by hand: numpy and a header, no torch.

At the default sizes it has 1.1 billion parameters and weighs 2.2 GB in bfloat16.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

BYTES_PER_VALUE = 2
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
VALUES_PER_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of one Llama, under the names of its config.json."""

    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    vocab_size: int = 32000

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, in the order in which they are stored."""
        hidden, kv = self.hidden_size, self.key_value_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "self_attn.q_proj.weight"] = (hidden, hidden)
            shapes[prefix + "self_attn.k_proj.weight"] = (kv, hidden)
            shapes[prefix + "self_attn.v_proj.weight"] = (kv, hidden)
            shapes[prefix + "self_attn.o_proj.weight"] = (hidden, hidden)
            shapes[prefix + "mlp.gate_proj.weight"] = (self.intermediate_size, hidden)
            shapes[prefix + "mlp.up_proj.weight"] = (self.intermediate_size, hidden)
            shapes[prefix + "mlp.down_proj.weight"] = (hidden, self.intermediate_size)
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @property
    def key_value_size(self) -> int:
        """Width of the keys, which is that of the values."""
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads

    @property
    def source_bytes(self) -> int:
        """Bytes of all weights of the dense model."""
        return sum(count(shape) for shape in self.tensors().values()) * BYTES_PER_VALUE

    def target_bytes(self, experts: int) -> int:
        """Bytes of all weights with every FFN there `experts` times and a router per layer."""
        ffn = 3 * self.hidden_size * self.intermediate_size
        added = self.num_hidden_layers * ((experts - 1) * ffn + experts * self.hidden_size)
        return self.source_bytes + added * BYTES_PER_VALUE


def count(shape: tuple[int, ...]) -> int:
    """Return the number of values of a tensor of this shape."""
    return int(np.prod(shape, dtype=np.int64))


def make(folder: Path, sizes: Sizes, *, seed: int = 0) -> Path:
    """Return the folder once it holds a checkpoint of these sizes, written unless it did."""
    config = json.dumps(_config(sizes), indent=2, sort_keys=True) + "\n"
    marker = folder / "config.json"
    if marker.is_file() and marker.read_text(encoding="utf-8") == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    _write_weights(folder / "model.safetensors", sizes, seed)
    _write_tokenizer(folder, sizes.vocab_size)
    # last: its presence says that the weights beside it are complete
    marker.write_text(config, encoding="utf-8")
    return folder


def _config(sizes: Sizes) -> dict[str, object]:
    rope_theta = 10000.0
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "head_dim": sizes.hidden_size // sizes.num_attention_heads,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "bos_token_id": sizes.vocab_size - 3,
        "eos_token_id": sizes.vocab_size - 2,
        "pad_token_id": sizes.vocab_size - 1,
        "use_cache": True,
    }


def _write_weights(path: Path, sizes: Sizes, seed: int) -> None:
    shapes = sizes.tensors()
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(_header(shapes))
        for name, shape in shapes.items():
            _write_tensor(file, name, count(shape), generator)


def _header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + count(shape) * BYTES_PER_VALUE
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, name: str, values: int, generator: np.random.Generator) -> None:
    if "norm" in name:
        file.write(_as_bfloat16(np.ones(values, dtype=np.float32)).tobytes())
        return
    for start in range(0, values, VALUES_PER_CHUNK):
        size = min(VALUES_PER_CHUNK, values - start)
        chunk = generator.standard_normal(size, dtype=np.float32) * np.float32(0.02)
        file.write(_as_bfloat16(chunk).tobytes())


def _as_bfloat16(values: np.ndarray) -> np.ndarray:
    # bfloat16 is the upper half of float32; the lower half is cut, as the weights are random anyway
    return (values.view(np.uint32) >> np.uint32(16)).astype("<u2")


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    tokens, merges = _byte_level_vocabulary(vocab_size - len(SPECIAL_TOKENS))
    vocabulary = {token: index for index, token in enumerate([*tokens, *SPECIAL_TOKENS])}
    added = [
        {"id": vocabulary[token], "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token in SPECIAL_TOKENS
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _byte_level_vocabulary(size: int) -> tuple[list[str], list[list[str]]]:
    # the 256 bytes, then as many pairs of bytes as the vocabulary has room for
    symbols = _byte_symbols()
    pairs = _pairs(symbols)
    merges = [list(next(pairs)) for _ in range(size - len(symbols))]
    return symbols + ["".join(pair) for pair in merges], merges


def _byte_symbols() -> list[str]:
    # the printable stand-ins for bytes that byte-level tokenizers use (GPT-2's table)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _pairs(symbols: list[str]) -> Iterator[tuple[str, str]]:
    for first in symbols:
        for second in symbols:
            yield first, second
