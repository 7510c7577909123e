"""Tiny real transformers models with a small real tokenizer, for tests; nothing is downloaded.

Weights are random but not timid: matrices are scaled so that activations and logits are of order
1 to 10, norms scatter around their neutral value and no bias is zero. A tensor that is lost,
swapped, transposed or not rescaled therefore shows in the logits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaconvert.testing.tiny_tokenizer import SPECIAL_TOKENS, save_tokenizer

#: rows of the embedding; the tokenizer has fewer tokens, as many real models do.
VOCAB = 320

_DECODER: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TIED: Mapping[str, object] = {"tie_word_embeddings": True}
_BIAS: Mapping[str, object] = {"attention_bias": True}
_GRANITE: Mapping[str, object] = {
    "embedding_multiplier": 1.5,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}
_LLAMA3_ROPE: Mapping[str, object] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONGROPE: Mapping[str, object] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
_PARTIAL_ROPE: Mapping[str, object] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
_WINDOW: Mapping[str, object] = {"use_sliding_window": True, "sliding_window": 8}
_QWEN_MOE: Mapping[str, object] = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
_SIGMOID_MOE: Mapping[str, object] = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}
_DEEPSEEK: Mapping[str, object] = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}

#: what each family needs besides the sizes above.
_EXTRA: dict[str, Mapping[str, object]] = {
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "phi3": {"original_max_position_embeddings": 32},
    "olmo3": {"sliding_window": 8},
    "granite": _GRANITE,
    "smollm3": {"no_rope_layer_interval": 2},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **_QWEN_MOE},
    "qwen2_moe": {**_QWEN_MOE, "shared_expert_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {**_GRANITE, "num_local_experts": 4},
    "granitemoeshared": {**_GRANITE, "num_local_experts": 4, "shared_intermediate_size": 48},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "deepseek_v2": _DEEPSEEK,
    "glm4_moe": _SIGMOID_MOE,
    "dots1": _SIGMOID_MOE,
    "ernie4_5_moe": {
        "moe_intermediate_size": 32,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    "vit": {"image_size": 16, "patch_size": 8, "num_labels": 3, "encoder_stride": 8},
}
_NO_KV_HEADS = ("gpt2", "gpt_neox", "bert", "vit")
_ARCHITECTURE = {"bert": "BertForMaskedLM", "vit": "ViTForImageClassification"}

#: name -> (family, config values that differ).
VARIANTS: dict[str, tuple[str, Mapping[str, object]]] = {
    "llama-tied": ("llama", _TIED),
    "llama-llama3-rope": ("llama", {"rope_parameters": _LLAMA3_ROPE, **_TIED}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-attention-bias": ("llama", _BIAS),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "mistral-sliding": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "mistral-tied": ("mistral", {**_TIED, "sliding_window": None}),
    "qwen2-tied": ("qwen2", _TIED),
    "qwen2-sliding": ("qwen2", {**_WINDOW, "max_window_layers": 1}),
    "qwen2-sliding-all": ("qwen2", {**_WINDOW, "max_window_layers": 0}),
    "qwen3-tied": ("qwen3", _TIED),
    "qwen3-attention-bias": ("qwen3", _BIAS),
    "qwen3-sliding": ("qwen3", {**_WINDOW, "max_window_layers": 1}),
    "gemma-untied": ("gemma", {"tie_word_embeddings": False, **_BIAS}),
    "gemma2-no-caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, **_BIAS},
    ),
    "gemma3_text-full": ("gemma3_text", {"layer_types": ["full_attention"] * 2}),
    "phi3-sliding": ("phi3", {"sliding_window": 8, **_TIED}),
    "phi3-longrope": ("phi3", {"rope_parameters": _LONGROPE}),
    "phi3-partial": ("phi3", {"rope_parameters": _PARTIAL_ROPE}),
    "olmo-tied": ("olmo", {**_TIED, **_BIAS}),
    "olmo-clip": ("olmo", {"clip_qkv": 0.5}),
    "olmo2-bias": ("olmo2", {**_TIED, **_BIAS}),
    "olmo3-full": ("olmo3", {"layer_types": ["full_attention"] * 2}),
    "granite-bias": ("granite", {**_TIED, **_BIAS, "mlp_bias": True}),
    "smollm3-all-rope": ("smollm3", {"no_rope_layers": [1, 1], "tie_word_embeddings": False}),
    "smollm3-sliding": ("smollm3", {**_WINDOW, **_BIAS}),
    "gpt2-inner": ("gpt2", {"n_inner": 48, "tie_word_embeddings": False}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gpt_neox-tied": ("gpt_neox", _TIED),
    "vit-no-bias": ("vit", {"qkv_bias": False}),
    "mixtral-tied": ("mixtral", {**_TIED, "head_dim": 16}),
    "mixtral-sliding": ("mixtral", {"sliding_window": 8}),
    "qwen2_moe-some-dense": ("qwen2_moe", {"mlp_only_layers": [0]}),
    "qwen2_moe-no-bias": ("qwen2_moe", {"qkv_bias": False, **_WINDOW}),
    "qwen3_moe-some-dense": ("qwen3_moe", {"mlp_only_layers": [1], **_BIAS}),
    "qwen3_moe-step": ("qwen3_moe", {"decoder_sparse_step": 2, **_TIED}),
    "granitemoe-bias": ("granitemoe", {**_TIED, **_BIAS}),
    "granitemoeshared-none": ("granitemoeshared", {"shared_intermediate_size": 0}),
    "flex_olmo-bias": ("flex_olmo", {**_TIED, **_BIAS}),
    "olmoe-bias": (
        "olmoe",
        {**_TIED, **_BIAS, "num_key_value_heads": 4, "norm_topk_prob": False, "clip_qkv": 1.0},
    ),
    "deepseek_v2-lite": (
        "deepseek_v2",
        {"q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 1.5, **_TIED},
    ),
    "deepseek_v2-bias": ("deepseek_v2", {**_BIAS, "first_k_dense_replace": 0}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    ),
    "glm4_moe-all-sparse": (
        "glm4_moe",
        {"first_k_dense_replace": 0, "use_qk_norm": True, **_BIAS, "head_dim": 16},
    ),
    "dots1-bias": ("dots1", {**_BIAS, "n_shared_experts": 2, "first_k_dense_replace": 0}),
    "ernie4_5_moe-bias": ("ernie4_5_moe", {"use_bias": True, "tie_word_embeddings": False}),
    "ernie4_5_moe-no-shared": (
        "ernie4_5_moe",
        {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_interval": 2},
    ),
}


def make(
    family: str,
    folder: Path | str,
    *,
    seed: int = 0,
    layers: int = 2,
    dtype: str = "float32",
    max_shard_size: str = "40KB",
    architecture: str | None = None,
    **config_overrides: object,
) -> Path:
    """Return `folder`, which now holds a tiny checkpoint as `save_pretrained` writes it.

    Beside the model there are a tokenizer, a chat template and a generation config, or an image
    processor.

    Args:
        family: a model_type, or one of VARIANTS.
        folder: where to write; made when missing, emptied when not.
        seed: of the weights; the same seed gives the same bytes.
        layers: number of blocks; variants that list their layers want 2.
        dtype: of every weight.
        max_shard_size: as in `save_pretrained`; the default makes several shards.
        architecture: transformers class, the family's usual one when None.
        **config_overrides: config values.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = config_values(family, layers=layers) | config_overrides
    family = VARIANTS.get(family, (family, {}))[0]
    model = build(family, values, architecture=architecture, seed=seed, dtype=dtype)
    with _no_progress_bar():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    if family == "vit":
        _write_image_processor(folder, model.config)
    else:
        save_tokenizer(folder)
    if model.can_generate():
        _write_generation_config(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def config_values(family: str, *, layers: int = 2) -> dict[str, object]:
    """Return the config values `make` starts from, for a model_type or one of VARIANTS."""
    family, variant = VARIANTS.get(family, (family, {}))
    base = {**_DECODER, "num_hidden_layers": layers}
    if family in _NO_KV_HEADS:
        del base["num_key_value_heads"]
    if family == "gpt2":
        del base["intermediate_size"]
    return {**base, **_EXTRA.get(family, {}), **variant}


def build(
    family: str,
    values: Mapping[str, object],
    *,
    architecture: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
) -> Any:
    """Return a transformers model with seeded weights, in evaluation mode."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(dict(values)))
    name = architecture or _ARCHITECTURE.get(family)
    auto = transformers.AutoModelForCausalLM
    model = getattr(transformers, name)(config) if name else auto.from_config(config)
    filled: set[int] = set()
    with torch.no_grad():
        for path, tensor in model.state_dict().items():
            # a tied head is the embedding under a second name
            if tensor.is_floating_point() and tensor.data_ptr() not in filled:
                filled.add(tensor.data_ptr())
                _fill(path, tensor, seed)
    return model.to(getattr(torch, dtype)).eval()


def _fill(path: str, tensor: Any, seed: int) -> None:
    import torch

    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.dim() == 1:
        tensor.add_(0.2 * noise)
    else:
        tensor.copy_((0.5 if "embed" in path or ".wte" in path else 0.2) * noise)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _write_generation_config(folder: Path) -> None:
    # by hand: what save_pretrained writes names the version that wrote it
    values = {
        "bos_token_id": 0,
        "eos_token_id": [SPECIAL_TOKENS.index("<|im_end|>")],
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 0.7,
    }
    (folder / "generation_config.json").write_text(json.dumps(values, indent=2) + "\n")


def _write_image_processor(folder: Path, config: Any) -> None:
    # by hand, as transformers needs Pillow to write it
    values = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": config.image_size, "width": config.image_size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")
