"""Few tokens through the selected rows of a feed-forward network only.

With one token every weight is read once, so time is bytes. Two uncompiled forms of the same sum:

- select: rows are copied into a kept buffer (a fresh one page-faults), then `linear`.
- loop: `linear` per expert on views; for wide experts in float32.

`adaptive_compiled` has the third, which is about twice as fast. The down matrix only gathers well
by rows of neurons (`adaptive_layout`); without them the hidden units are spread out again and the
whole matrix is run, which still saves the other two.

Shapes: d hidden size, f neurons, E experts, m = `width` neurons of an expert, K selected experts,
n selected neurons.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adaptive_layout import rows_of

#: float32 experts at least this wide run in a loop.
LOOP_WIDTH = 64

Activation = Callable[[Tensor], Tensor]
#: (x [T, d], weights, mask [T, E] or [E], gated [T, f] | None) -> [T, d]
Run = Callable[[Tensor, "ExpertWeights", Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of one feed-forward network, as views of its module's parameters.

    Attributes:
        gate: [f, d], None for a network without.
        up: [f, d].
        down: [d, f]; gathers well where `adaptive_layout.rows_of` has rows for it.
        gate_bias, up_bias: [f] or None.
        down_bias: [d] or None.
        activation: of the gate, or of `up` where there is none; elementwise, no state.
        width: m.
        shared: always-on neurons in front.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Activation
    width: int
    shared: int = 0

    @property
    def count(self) -> int:
        """Return E."""
        return (self.up.shape[0] - self.shared) // self.width

    @functools.cached_property
    def ordinary(self) -> bool:
        """Return what `plain` says, as it was when first asked."""
        return plain(self)

    @functools.cached_property
    def graphs(self) -> dict[tuple[object, ...], Callable[..., tuple[Tensor, ...]] | None]:
        """Return where what was compiled for these matrices is kept at hand."""
        return {}


def plain(weights: ExpertWeights) -> bool:
    """Return whether all of it is ordinary CPU tensors of one floating dtype."""
    tensors = (weights.gate, weights.up, weights.down)
    biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
    dtype = weights.up.dtype
    return dtype.is_floating_point and all(
        type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == dtype
        for t in (*tensors, *biases)
        if t is not None
    )


def unrecorded() -> bool:
    """Return whether neither autograd nor a compiler watches and no dtype changes on the way."""
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not watched and not torch.is_autocast_enabled("cpu")


def observed() -> bool:
    """Return whether somebody looks at each operation: a dispatch mode (`FlopCounterMode`,
    `make_fx`), `torch.jit.trace`, a transform of `torch.func` or forward derivatives. They do not
    see into a compiled graph that is called without torch's wrapper."""
    counted = torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()
    derived = torch.autograd.forward_ad._current_level >= 0
    return counted or derived or torch._C._functorch.peek_interpreter_stack() is not None


def selected_rows(mask: Tensor, width: int, shared: int) -> Tensor:
    """Return the rows of the shared neurons and of the selected experts' neurons, [E] -> [n]."""
    rows = mask.nonzero().view(-1)
    if width > 1:
        within = torch.arange(width, device=mask.device)
        rows = (rows.unsqueeze(-1) * width + within).view(-1)
    if shared:
        rows = torch.cat([torch.arange(shared, device=mask.device), rows + shared])
    return rows


def weighted_rows(matrix: Tensor, rows: Tensor, factors: Tensor, bags: int) -> Tensor:
    """Return the sum of the rows of a matrix [f, d], each times its factor: [n], [n] -> [1, d].

    Args:
        bags: partial sums; each runs on one thread.
    """
    starts = torch.arange(bags) * (rows.shape[0] // bags)
    parts = functional.embedding_bag(rows, matrix, starts, mode="sum", per_sample_weights=factors)
    return parts if bags == 1 else parts.sum(dim=0, keepdim=True)


def uncompiled(weights: ExpertWeights) -> Run:
    """Return the faster of the uncompiled forms.

    At 2048x8192 and a quarter the loop reaches 3.4 times the speed of `linear` in float32, copied
    rows 2.5; in bfloat16 it is 1.6 and 3.3, and at 576x1536 3.0 and 4.5.
    """
    wide = weights.width >= LOOP_WIDTH and weights.up.dtype in (torch.float32, torch.float64)
    return by_loop if wide else by_copies


class _Buffers(threading.local):
    """Row copies that are kept, so that their pages are."""

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.dtype, int], Tensor] = {}

    def rows(self, matrix: Tensor, rows: Tensor, slot: int) -> Tensor:
        """Return a copy of the rows, valid until the next call with this slot."""
        numel = rows.shape[0] * matrix.shape[1]
        key = (matrix.dtype, slot)
        found = self.kept.get(key)
        if found is None or found.numel() < numel:
            # a buffer made in inference mode could not be written outside of it
            with torch.inference_mode(False):
                found = self.kept[key] = torch.empty(numel, dtype=matrix.dtype)
        out = found[:numel].view(rows.shape[0], matrix.shape[1])
        return torch.index_select(matrix, 0, rows, out=out)


_BUFFERS = _Buffers()


def by_copies(x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
    """Return one token's output from its selected experts, [1, d], [E] -> [1, d]."""
    rows = selected_rows(mask, weights.width, weights.shared)

    def product(matrix: Tensor, bias: Tensor | None, slot: int) -> Tensor:
        part = None if bias is None else bias[rows]
        return functional.linear(x, _BUFFERS.rows(matrix, rows, slot), part)

    hidden = _hidden(weights, product, None if gated is None else gated[:, rows])
    down = rows_of(weights.down)
    if down is not None:
        out = weighted_rows(down, rows, hidden[0], torch.get_num_threads())
        return out if weights.down_bias is None else out + weights.down_bias
    spread = hidden.new_zeros(1, weights.down.shape[1]).scatter_(1, rows[None], hidden)
    return functional.linear(spread, weights.down, weights.down_bias)


def by_loop(x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
    """Return one token's output from its selected experts, [1, d], [E] -> [1, d]."""
    width, shared = weights.width, weights.shared
    starts = [shared + e * width for e in mask.nonzero().view(-1).tolist()]
    parts = [slice(start, start + width) for start in starts]
    out = x.new_zeros(1, weights.down.shape[0])
    if weights.down_bias is not None:
        out += weights.down_bias
    for part in [slice(0, shared), *parts] if shared else parts:

        def product(matrix: Tensor, bias: Tensor | None, slot: int, part: slice = part) -> Tensor:
            return functional.linear(x, matrix[part], None if bias is None else bias[part])

        hidden = _hidden(weights, product, None if gated is None else gated[:, part])
        out += functional.linear(hidden, weights.down[:, part])
    return out


def _hidden(
    weights: ExpertWeights,
    product: Callable[[Tensor, Tensor | None, int], Tensor],
    gated: Tensor | None,
) -> Tensor:
    """Return hidden units [1, n] from a function that multiplies x with a part of a matrix."""
    gate = weights.gate
    if gated is None:
        first = (weights.up, weights.up_bias) if gate is None else (gate, weights.gate_bias)
        gated = weights.activation(product(*first, 0))
    return gated if gate is None else gated * product(weights.up, weights.up_bias, 1)
