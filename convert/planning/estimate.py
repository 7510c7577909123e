"""What a model costs to hold and to run, and what a run needs; from shapes alone.

1 multiply-add = 2 FLOPs. Per token: every matrix a token passes through costs 2 FLOPs per entry (a
tied head costs as a head), and a block's attention to n tokens costs 4 * heads * head_dim *
min(n, window of that block), where head_dim is the mean of queries' and values' should they
differ. Norms, biases, embedding look-ups and what runs once per text (a pooler, a classifier on it)
are left out. `config.adaptive.reference`, what an adaptive model counts while it runs and the
numbers of every report follow this one rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from adaconvert.arch import null_experts
from adaconvert.arch.adapters import ADAPTER_ROLES, active_adapters, adapted, shapes_of
from adaconvert.arch.adaptive import active_share
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.exits import DRAFT_TOKENS, EXIT_ROLES, checked
from adaconvert.arch.projections import active_shares, stock_spec
from adaconvert.arch.recursion import RESIDUAL_ROLES, repeated
from adaconvert.arch.registry import layer_mask
from adaconvert.arch.routed_layers import ADAPTER as DEPTH_ADAPTER
from adaconvert.arch.routed_layers import ROUTER as DEPTH_ROUTER
from adaconvert.dtypes import nbytes_of
from adaconvert.planning.functions import SEVERAL
from adaconvert.planning.ops import Apply, Bytes, Expr, Fitted, Gather, Init, Plan

#: context length at which attention is counted unless another is asked for.
CONTEXT = 2048

_FFN_ROLES = frozenset({"gate", "up", "down", "gate_up"})
_PER_EXPERT = ("expert_",)
_SHARED = "shared_"
_FFN_STARTS = (*_PER_EXPERT, _SHARED, "router")
_LOOKUPS = frozenset({"embed", "pos_embed", "neuron_order"})
#: roles of whole numbers, which are no parameters.
_WHOLE = ("neuron_order", DRAFT_TOKENS)
#: matrices every token passes through, besides those of the feed-forward networks.
_PER_TOKEN = frozenset(
    {
        *("q", "k", "v", "o", "qkv", "qkv_by_head", "q_down", "q_up", "kv_down", "kv_up"),
        *("head", "head_transform", "span_head"),
        *("patch_embed", "pixel_head", "projection_up", "projection_down", "projection_router"),
        *ADAPTER_ROLES,
        *RESIDUAL_ROLES,
    }
)
#: kinds of blocks with null experts that are named.
_MOST_WORDS = 3
#: tokens of context an adaptive model's compute is stated at.
REFERENCE_LENGTH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs of one model.

    Attributes:
        total_params: stored parameters.
        active_params: parameters a token passes through, norms and biases too, embedding look-ups
            not.
        flops: FLOPs per token at `context` tokens of context, head included.
        ffn_flops: of these, in feed-forward networks, experts, shared experts and routers, and in
            routed adapters on the networks' own linears; not in the routers of adapters, which
            other linears may use as well.
        weight_bytes: bytes of the matrices read per token when decoding one sequence.
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


def _is_ffn(tensor: TensorSpec) -> bool:
    own = tensor.role in _FFN_ROLES or tensor.role.startswith(_FFN_STARTS)
    return own and len(tensor.shape) > 1 and not tensor.role.endswith("_bias")


def _is_routed(tensor: TensorSpec) -> bool:
    """Return whether a matrix is of a dense network, a routed expert or a router."""
    own = tensor.role in _FFN_ROLES or tensor.role.startswith((*_PER_EXPERT, "router"))
    return own and len(tensor.shape) > 1


def _is_per_token(spec: ModelSpec, tensor: TensorSpec) -> bool:
    """Return whether a tensor is a matrix that every token passes through, or may."""
    if tensor.role == "classifier":
        return spec.architecture.endswith("ForTokenClassification") and len(tensor.shape) > 1
    if tensor.role == DEPTH_ROUTER:
        return len(tensor.shape) > 1
    return tensor.role in _PER_TOKEN or _is_ffn(tensor)


def _active_share(
    spec: ModelSpec,
    tensor: TensorSpec,
    split: Mapping[int, tuple[float, bool]],
    nulled: Mapping[int, float],
) -> float:
    """Return the share of a tensor's entries one token passes through."""
    # as a conversion leaves it, no token skips a block
    if tensor.role in _LOOKUPS or tensor.role in EXIT_ROLES or tensor.role == DEPTH_ADAPTER:
        return 0.0
    if tensor.layer is not None and tensor.layer in split and tensor.role in _FFN_ROLES:
        share, whole_gate = split[tensor.layer]
        first = "gate" if spec.traits.ffn == "glu" else "up"
        if whole_gate and tensor.role == "gate_up":
            return (1 + share) / 2
        return 1.0 if whole_gate and tensor.role == first else share
    if tensor.role.startswith(_PER_EXPERT):
        chosen = spec.top_k if tensor.layer is None else nulled.get(tensor.layer, spec.top_k)
        return chosen / spec.num_experts
    return 1.0


def experts_run(spec: ModelSpec) -> dict[int, float]:
    """Return, for each block with null experts, the real experts a token runs: those of its start
    while it is as made, else what its target says, or those of the source."""
    if spec.adaptive is None:
        return {}
    found = null_experts.nulled(spec, spec.adaptive)
    return {mixture.layer: nulls.expected(mixture) for mixture, nulls in found}


def counted(spec: ModelSpec) -> str:
    """Return in words at how many real experts `costs` counts blocks with null experts; "" where
    there are none."""
    if spec.adaptive is None:
        return ""
    found = null_experts.nulled(spec, spec.adaptive)
    words = [nulls.counted(mixture) for mixture, nulls in found]
    each = [f"{words.count(word)} blocks at {word}" for word in dict.fromkeys(words)]
    more = [] if len(each) <= _MOST_WORDS else [f"{len(each) - _MOST_WORDS} more kinds of blocks"]
    return "; ".join(each[:_MOST_WORDS] + more)


def is_of_ffn(role: str) -> bool:
    """Return whether a linear is one of a feed-forward network or of a shared expert."""
    return role in _FFN_ROLES or role.startswith(_SHARED)


def _ffn_adapters(spec: ModelSpec) -> frozenset[str]:
    """Return the tensors of routed adapters, without routers, on linears of FFNs."""
    if spec.adaptive is None:
        return frozenset()
    return frozenset(
        f"{linear.stored}.{name}"
        for linear, slot in adapted(stock_spec(spec), spec.adaptive)
        if is_of_ffn(linear.role)
        for name in shapes_of(linear.path, slot)
        if name.startswith("adapters.")
    )


def unchosen_flops(spec: ModelSpec) -> tuple[int, int]:
    """Return FLOPs per token of the matrices of an adaptive model that no site of it counts:
    neither split networks, mixtures with null experts and networks in place of projections, nor
    adapters; attention's scores left out.

    Returns:
        Of all such matrices, and of these in feed-forward networks.
    """
    sited = {*active_share(spec), *experts_run(spec)}
    every = ffn = Fraction(0)
    for tensor in (*spec.tensors, *(tensor for tensor, _ in repeated(spec))):
        is_ffn = _is_ffn(tensor)
        is_counted = is_ffn and tensor.layer in sited and not tensor.role.startswith(_SHARED)
        own = tensor.role in ADAPTER_ROLES or tensor.role.startswith("projection_")
        if is_counted or own or not _is_per_token(spec, tensor):
            continue
        routed = tensor.role.startswith(_PER_EXPERT)
        share = Fraction(spec.top_k, spec.num_experts) if routed else Fraction(1)
        every += 2 * math.prod(tensor.shape) * share
        ffn += 2 * math.prod(tensor.shape) * share if is_ffn else 0
    return int(every), int(ffn)


def costs(spec: ModelSpec, dtypes: Mapping[str, str], context: int = CONTEXT) -> Costs:
    """Return the costs of a checkpoint; with early exits, those of a token that takes none of them,
    the checks at those it may take included.

    Args:
        spec: description of the model.
        dtypes: stored dtype of each tensor by name; tensors missing here are taken as absent.
        context: tokens of context attention is counted at.
    """
    total = active = matrices = ffn = read = 0.0
    split, nulled = active_share(spec), experts_run(spec)
    chosen = {**active_shares(spec), **active_adapters(spec)}
    beside = _ffn_adapters(spec)
    embedded = next((t.name for t in spec.tensors if t.role == "embed"), "")
    for tensor in spec.tensors:
        # a tied head is not stored and runs all the same
        stored = tensor.name if tensor.name in dtypes or tensor.role != "head" else embedded
        if stored not in dtypes:
            continue
        size = math.prod(tensor.shape)
        share = chosen.get(tensor.name, _active_share(spec, tensor, split, nulled))
        total += size if stored == tensor.name and tensor.role not in _WHOLE else 0
        active += size * share
        if _is_per_token(spec, tensor):
            matrices += 2 * size * share
            read += nbytes_of(dtypes[stored], tensor.shape) * share
        ffn += 2 * size * share if _is_ffn(tensor) or tensor.name in beside else 0
    for tensor, owner in repeated(spec):
        # stored once, and every depth of the group runs it
        size = math.prod(tensor.shape)
        active += size
        matrices += 2 * size
        read += nbytes_of(dtypes[owner], tensor.shape) if owner in dtypes else 0
        ffn += 2 * size if _is_ffn(tensor) else 0
    for tensor in checked(spec):
        size = math.prod(tensor.shape)
        active += size if tensor.role in EXIT_ROLES else 0
        matrices += 2 * size
        read += nbytes_of(dtypes.get(tensor.name) or dtypes[embedded], tensor.shape)
    seen = sum(min(context, window or context) for window in _windows(spec))
    return Costs(
        total_params=int(total),
        active_params=round(active),
        flops=round(matrices) + 2 * spec.heads * _head_dims(spec) * seen,
        ffn_flops=round(ffn),
        weight_bytes=round(read),
        context=context,
    )


def reference(
    spec: ModelSpec, layers: frozenset[int], length: int = REFERENCE_LENGTH
) -> dict[str, int]:
    """Return what the source costs per token, as `config.adaptive.reference` states it.

    2 FLOPs per entry of every matrix a token passes through, of a mixture's experts those it
    chooses, the head included and the embedding look-up not; scores and weighted sums of attention
    at the mean length a token of a text of `length` tokens sees. Pooler and classifier run once per
    text and are left out.

    Args:
        spec: the dense model, or the mixture.
        layers: converted blocks; "ffn_flops_per_token" is theirs: of a dense network, or of routed
            experts and router.
        length: tokens of the text; an image has as many as it has.
    """
    per_token = ffn = Fraction(0)
    for tensor in spec.tensors:
        size = Fraction(2 * math.prod(tensor.shape))
        if tensor.role.startswith(_PER_EXPERT):
            # whole again once all experts are added
            size *= Fraction(spec.top_k, spec.num_experts)
        per_token += size if _is_per_token(spec, tensor) else 0
        if tensor.layer in layers and _is_routed(tensor):
            ffn += size
        if tensor.role == "pos_embed" and spec.kind == "vision":
            length = tensor.shape[1]
    whole = int(per_token) + round(attention_flops(spec, {length: 1}))
    return {"flops_per_token": whole, "ffn_flops_per_token": int(ffn), "length": length}


def attention_flops(spec: ModelSpec, lengths: Mapping[int, int]) -> float:
    """Return the mean FLOPs per token of attention's scores and weighted sums.

    Args:
        spec: the model.
        lengths: length of a text -> how many there are.
    """
    tokens = sum(length * count for length, count in lengths.items())
    seen = sum(
        count * _seen(spec, window, length)
        for window in _windows(spec)
        for length, count in lengths.items()
    )
    return 2 * spec.heads * _head_dims(spec) * seen / max(tokens, 1)


def _head_dims(spec: ModelSpec) -> int:
    """Return the size of a head of queries plus that of a head of values."""
    return spec.head_dim + (spec.value_dim or spec.head_dim)


def _windows(spec: ModelSpec) -> list[int | None]:
    """Return how many tokens each block attends to at most, None for all."""
    sliding = layer_mask(spec, "sliding") or (spec.traits.sliding == "uniform",) * spec.layers
    return [spec.traits.sliding_window if slides else None for slides in sliding]


def _seen(spec: ModelSpec, window: int | None, length: int) -> int:
    """Return how many tokens the tokens of a text attend to, summed, themselves included."""
    if spec.kind != "decoder":
        return length * length
    near = min(window or length, length)
    return near * (near + 1) // 2 + (length - near) * near


def _float_bytes(expr: Expr) -> int:
    """Return a bound on the float32 memory evaluating an expression takes: its tree, all alive at
    once."""
    if isinstance(expr, Apply) and expr.fn == "concat":
        return max(_float_bytes(arg) for arg in expr.args)
    own = 4 * math.prod(expr.shape)
    if isinstance(expr, Apply) and expr.fn == "residual":
        # in float64: the difference, a factor of it, its square on the smaller side, and what finds
        # its vectors
        whole, side = math.prod(expr.args[0].shape), min(expr.args[0].shape)
        return own + 16 * whole + 40 * side**2 + sum(_float_bytes(arg) for arg in expr.args)
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
        return max((arg.shape for arg in expr.args), key=math.prod)
    return expr.shape


def working_memory(plan: Plan) -> int:
    """Return a bound on the memory the largest computed tensor takes; 0 for a plan of copies."""
    # rounding to 16 bits holds the float32 bits and a copy of them beside the value
    computed = [
        _float_bytes(t.expr) + 8 * math.prod(_largest_part(t.expr))
        for t in plan.targets
        if isinstance(t.expr, Apply | Init | Fitted)
        or (isinstance(t.expr, Bytes) and t.expr.dtype != t.dtype)
    ]
    computed += [gather_bytes(t.expr) for t in plan.targets if isinstance(t.expr, Gather)]
    # an array of several tensors stays while the next ones are made
    kept = [4 * math.prod(part.shape) for t in plan.targets for part in _several(t.expr)]
    return max(computed, default=0) + max(kept, default=0)


def _several(expr: Expr) -> Iterator[Apply]:
    """Yield what an expression is a part of."""
    if isinstance(expr, Apply):
        if expr.fn in SEVERAL:
            yield expr
        for arg in expr.args:
            yield from _several(arg)
