"""Checkpoints of real models without their weights: true config and shapes, holes for numbers.

What a conversion of such a model writes and needs can be planned on these as on the real one, and
nothing is downloaded. Numbers are those of the models' published config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adaconvert.arch.registry import describe
from adaconvert.running.stand_in import write_stand_in

_LLAMA3_ROPE: Final[Mapping[str, object]] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
#: model -> config.json; stored in bfloat16, without biases, with SiLU.
CONFIGS: Final[dict[str, Mapping[str, object]]] = {
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "clip_qkv": None,
        "tie_word_embeddings": False,
    },
}
_SHARED: Final[Mapping[str, object]] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hole:
    """A tensor of the stand-in, as `io.layout` wants it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"
    group: str = ""


def model_of(recipe: str) -> str:
    """Return the model of `CONFIGS` a shipped recipe is named after; what follows it tells recipes
    of one method apart."""
    name = recipe.rpartition("/")[2]
    return max((model for model in CONFIGS if name.startswith(model)), key=len)


def make(model: str, folder: Path) -> Path:
    """Return a new folder with the config and headers of a model named in `CONFIGS`."""
    return make_of(CONFIGS[model], folder)


def make_of(config: Mapping[str, object], folder: Path) -> Path:
    """Return a new folder with the headers of the model a config describes."""
    whole = {**_SHARED, **config}
    tied = bool(whole["tie_word_embeddings"])
    tensors = [
        _Hole(name=tensor.name, shape=tensor.shape)
        for tensor in describe(whole).tensors
        if not (tied and tensor.role == "head") and tensor.name.endswith("weight")
    ]
    return write_stand_in(folder, whole, tensors)
