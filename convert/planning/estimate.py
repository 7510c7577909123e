"""What a model costs to hold and to run, and what a run needs; from shapes alone.

1 multiply-add = 2 FLOPs. Per token: every weight matrix a token passes through costs 2 FLOPs per
entry (embedding look-ups cost none, a tied head costs as a head), and attention over a context of n
tokens costs 4 * heads * head_dim * min(n, window) per block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaconvert.arch.adaptive import active_share
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.registry import layer_mask
from adaconvert.dtypes import nbytes_of
from adaconvert.planning.ops import Apply, Bytes, Expr, Fitted, Gather, Init, Plan

#: context length at which attention is counted unless another is asked for.
CONTEXT = 2048

_FFN_ROLES = frozenset({"gate", "up", "down", "gate_up"})
_PER_EXPERT = ("expert_",)
_LOOKUPS = frozenset({"embed", "pos_embed", "neuron_order"})
#: matrices every token passes through, besides those of the feed-forward networks.
_PER_TOKEN = frozenset(
    {"q", "k", "v", "o", "qkv", "qkv_by_head", "head", "head_transform", "patch_embed"}
)
#: tokens of context an adaptive model's compute is stated at.
REFERENCE_LENGTH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs of one model.

    Attributes:
        total_params: stored parameters.
        active_params: parameters a token passes through, embedding look-ups not counted.
        flops: FLOPs per token at `context` tokens of context, head included.
        ffn_flops: of these, in feed-forward networks, experts, shared experts and routers.
        weight_bytes: bytes of weights read per token when decoding one sequence.
        context: tokens of context attention is counted at.
    """

    total_params: int
    active_params: int
    flops: int
    ffn_flops: int
    weight_bytes: int
    context: int

    def to_json(self) -> dict[str, int]:
        """Return the numbers by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _active_share(
    spec: ModelSpec, tensor: TensorSpec, split: Mapping[int, tuple[float, bool]]
) -> float:
    """Return the share of a tensor's entries one token passes through."""
    if tensor.role in _LOOKUPS:
        return 0.0
    if tensor.layer is not None and tensor.layer in split and tensor.role in _FFN_ROLES:
        share, whole_gate = split[tensor.layer]
        first = "gate" if spec.traits.ffn == "glu" else "up"
        if whole_gate and tensor.role == "gate_up":
            return (1 + share) / 2
        return 1.0 if whole_gate and tensor.role == first else share
    if tensor.role.startswith(_PER_EXPERT):
        return spec.top_k / spec.num_experts
    return 1.0


def costs(spec: ModelSpec, dtypes: Mapping[str, str], context: int = CONTEXT) -> Costs:
    """Return the costs of a checkpoint.

    Args:
        spec: description of the model.
        dtypes: stored dtype of each tensor by name; tensors missing here are taken as absent.
        context: tokens of context attention is counted at.
    """
    total = active = ffn = read = 0.0
    head = False
    split = active_share(spec)
    for tensor in spec.tensors:
        if tensor.name not in dtypes:
            continue
        size, share = _count(tensor.shape), _active_share(spec, tensor, split)
        total += 0 if tensor.role == "neuron_order" else size
        active += size * share
        read += nbytes_of(dtypes[tensor.name], tensor.shape) * share
        head = head or tensor.role == "head"
        if tensor.role in _FFN_ROLES or tensor.role.startswith(("expert_", "shared_", "router")):
            ffn += 2 * size * share
    matrices = 2 * active
    if not head and spec.kind == "decoder":
        matrices += 2 * spec.vocab * spec.hidden
        active += spec.vocab * spec.hidden
        read += sum(nbytes_of(dtypes[t.name], t.shape) for t in spec.tensors if t.role == "embed")
    window = spec.traits.sliding_window if spec.traits.sliding == "uniform" else None
    length = min(context, window or context)
    attention = 4 * spec.layers * spec.heads * spec.head_dim * length
    return Costs(
        total_params=int(total),
        active_params=int(active),
        flops=int(matrices) + attention,
        ffn_flops=int(ffn),
        weight_bytes=int(read),
        context=context,
    )


def reference(
    spec: ModelSpec, layers: frozenset[int], length: int = REFERENCE_LENGTH
) -> dict[str, int]:
    """Return what a dense model costs per token, as `config.adaptive.reference` states it.

    2 FLOPs per entry of every matrix a token passes through, the head included and the embedding
    look-up not; scores and weighted sums of attention at the mean length a token of a text of
    `length` tokens sees. Pooler and classifier run once per text and are left out.

    Args:
        spec: the dense model.
        layers: blocks whose feed-forward network is split; "ffn_flops_per_token" is theirs.
        length: tokens of the text; an image has as many as it has.
    """
    per_token = ffn = 0
    for tensor in spec.tensors:
        size = 2 * _count(tensor.shape)
        if tensor.role in _FFN_ROLES or tensor.role in _PER_TOKEN:
            per_token += size
        if tensor.role in _FFN_ROLES and tensor.layer in layers:
            ffn += size
        if tensor.role == "pos_embed" and spec.kind == "vision":
            length = tensor.shape[1]
    attended = sum(_mean_length(spec, layer, length) for layer in range(spec.layers))
    whole = per_token + round(4 * spec.heads * spec.head_dim * attended)
    return {"flops_per_token": whole, "ffn_flops_per_token": ffn, "length": length}


def _mean_length(spec: ModelSpec, layer: int, length: int) -> float:
    """Return how many tokens a token of a text attends to on average."""
    if spec.kind != "decoder":
        return length
    sliding = layer_mask(spec, "sliding")
    slides = sliding[layer] if sliding else spec.traits.sliding == "uniform"
    window = min(spec.traits.sliding_window or length, length) if slides else length
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _float_bytes(expr: Expr) -> int:
    """Return a bound on the float32 memory evaluating an expression takes: its tree, all alive at
    once."""
    if isinstance(expr, Apply) and expr.fn == "concat":
        return max(_float_bytes(arg) for arg in expr.args)
    own = 4 * _count(expr.shape)
    if isinstance(expr, Bytes):
        return own + nbytes_of(expr.dtype, expr.shape)
    if isinstance(expr, Init | Fitted):
        return own
    if isinstance(expr, Gather):
        return own + gather_bytes(expr)
    return 2 * own + sum(_float_bytes(arg) for arg in expr.args)


def gather_bytes(expr: Gather) -> int:
    """Return a bound on the memory a reordering takes: the tensor, and a copy of a part of it."""
    return 2 * nbytes_of(expr.arg.dtype, expr.arg.shape)


def _largest_part(expr: Expr) -> tuple[int, ...]:
    """Return the shape of the largest tensor an expression is rounded as."""
    if isinstance(expr, Apply) and expr.fn == "concat":
        return max((arg.shape for arg in expr.args), key=_count)
    return expr.shape


def working_memory(plan: Plan) -> int:
    """Return a bound on the memory the largest computed tensor takes; 0 for a plan of copies."""
    # rounding to 16 bits holds the float32 bits and a copy of them beside the value
    computed = [
        _float_bytes(t.expr) + 8 * _count(_largest_part(t.expr))
        for t in plan.targets
        if isinstance(t.expr, Apply | Init | Fitted)
        or (isinstance(t.expr, Bytes) and t.expr.dtype != t.dtype)
    ]
    computed += [gather_bytes(t.expr) for t in plan.targets if isinstance(t.expr, Gather)]
    return max(computed, default=0)
