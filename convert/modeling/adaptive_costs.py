"""What the parts of a model cost that no selection changes: projections, head, attention scores.

One rule, the reference's (`planning.estimate.reference`): 2 FLOPs per entry of every matrix a token
passes through, the head included; norms, biases, embedding look-ups and what runs once per text
(a pooler, a classifier on it) are left out; attention at the length each token really sees, each
layer by its window. Sizes are those of the matrices, however their weights are packed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ENCODERS = frozenset({"bert", "roberta", "electra", "distilbert", "vit", "deit", "dinov2"})
#: endings of class names of encoders whose classifier runs once per text or image.
_ONCE = ("ForSequenceClassification", "ForImageClassification", "ForNextSentencePrediction")

#: names of how many experts a token of a stock mixture runs.
_CHOSEN = ("num_experts_per_tok", "moe_k")


def matrix_size(module: Any) -> tuple[int, int] | None:
    """Return entries and weight bytes of a matrix, None for a module that is none.

    An adapter counts as the matrix it adapts; 4-bit weights count two entries per byte.
    """
    module = getattr(module, "base_layer", module)
    weight = getattr(module, "weight", None)
    if callable(weight):
        # dynamically quantised (torch.ao): the packed weight is unpacked on demand
        weight = weight()
    if not isinstance(weight, Tensor) or weight.dim() < 2 or isinstance(module, nn.Embedding):
        return None
    entries = weight.numel()
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        entries = int(module.in_features) * int(module.out_features)
    elif not isinstance(module, Conv1D | nn.Conv2d):
        return None
    return entries, weight.numel() * weight.element_size()


def mixed_size(module: Any, config: Any) -> tuple[int, int] | None:
    """Return entries a token passes in, and their weight bytes, of a stock mixture's experts or of
    its router, None for a module that is neither.

    Args:
        module: of the model.
        config: of the model, which says how many experts a token runs.
    """
    own = list(module.parameters(recurse=False))
    experts = [p for p in own if p.dim() == 3]
    if experts and hasattr(module, "num_experts"):
        chosen = _chosen(config.get_text_config())
        return _counted([chosen * (p.numel() // len(p)) for p in experts], experts)
    if hasattr(module, "top_k") and not hasattr(module, "in_features"):
        rows = [p for p in own if p.dim() == 2]
        return _counted([p.numel() for p in rows], rows) if rows else None
    return None


def _chosen(config: Any) -> int:
    """Return how many experts a token of a stock mixture runs."""
    return next(int(getattr(config, name)) for name in _CHOSEN if hasattr(config, name))


def _counted(entries: list[int], weights: list[Any]) -> tuple[int, int]:
    sizes = [n * p.element_size() for n, p in zip(entries, weights, strict=True)]
    return sum(entries), sum(sizes)


def static_costs(model: Any, inside: Collection[int]) -> tuple[int, int]:
    """Return FLOPs and weight bytes per token of every matrix outside the sites.

    Args:
        model: an adaptive model.
        inside: ids of the modules that sites and their adapters are made of.
    """
    once = _once_per_text(model)
    flops = size = 0
    for name, module in model.named_modules():
        skipped = id(module) in inside or hasattr(module, "base_layer")
        found = None if skipped or name.startswith(once) else matrix_size(module)
        if found is None and not skipped:
            found = mixed_size(module, model.config)
        if found is not None:
            flops += 2 * found[0]
            size += found[1]
    return flops, size


def _once_per_text(model: Any) -> tuple[str, ...]:
    """Return the beginnings of names of modules that see one token of each text."""
    prefix = model.base_model_prefix
    bare = bool(prefix) and not hasattr(model, prefix)
    pooler = "pooler" if bare else f"{prefix}.pooler"
    heads = () if is_causal(model.config) else ("classifier", "cls.seq_relationship")
    named = type(model).__name__
    return (pooler, *(heads if named.endswith(_ONCE) else heads[1:]))


def is_causal(config: Any) -> bool:
    """Return whether tokens see only what is before them."""
    return config.model_type.removeprefix("adaptive_") not in _ENCODERS


def patches(config: Any, pixels: Tensor) -> int:
    """Return how many tokens an image becomes, the class token included."""
    side = int(config.patch_size)
    return (pixels.shape[-2] // side) * (pixels.shape[-1] // side) + 1


def attention_flops(config: Any, lengths: Tensor) -> int:
    """Return the FLOPs of scores and weighted sums of tokens that see `lengths` positions."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    layers = config.num_hidden_layers
    kinds = (
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * layers
    )
    full = int(lengths.sum())
    near = int(lengths.clamp_max(window).sum()) if window else full
    seen = sum(near if "sliding" in kind else full for kind in kinds[:layers])
    # latent attention has another size for values
    both = getattr(config, "qk_head_dim", head) + getattr(config, "v_head_dim", head)
    return int(2 * heads * both * seen)
