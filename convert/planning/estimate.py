"""What a model costs to hold and to run, and what a run needs; from shapes alone.

1 multiply-add = 2 FLOPs. Per token: every weight matrix a token passes through costs 2 FLOPs per
entry (embedding look-ups cost none, a tied head costs as a head), and attention over a context of n
tokens costs 4 * heads * head_dim * min(n, window) per block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.dtypes import nbytes_of
from adaconvert.planning.ops import Apply, Bytes, Expr, Fitted, Init, Plan

#: context length at which attention is counted unless another is asked for.
CONTEXT = 2048

_FFN_ROLES = frozenset({"gate", "up", "down", "gate_up"})
_PER_EXPERT = ("expert_",)
_LOOKUPS = frozenset({"embed", "pos_embed"})


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


def _active_share(spec: ModelSpec, tensor: TensorSpec) -> float:
    """Return the share of a tensor's entries one token passes through."""
    if tensor.role in _LOOKUPS:
        return 0.0
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
    for tensor in spec.tensors:
        if tensor.name not in dtypes:
            continue
        size, share = _count(tensor.shape), _active_share(spec, tensor)
        total += size
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
    return 2 * own + sum(_float_bytes(arg) for arg in expr.args)


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
    return max(computed, default=0)
