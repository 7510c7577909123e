"""Triton kernels of `decode.dynk_decode`: one to a few tokens, the selected experts' rows only.

Two launches, or three, each bound by reading weights once:

- `_hidden_kernel`: a program per (token, slot, some neurons of its expert) makes their hidden
  values, in the accumulator's dtype, the slot's weight included.
- `_output_kernel`: a program per (token, block of the output, share of the rows) adds up rows of
  the down matrices, times the hidden values. Where few blocks would leave a device idle, rows split
  into shares, and `_sum_kernel` adds the results of these in a fixed order.

No atomics, and no order depends on timing. How many slots a token uses is read on the device; slots
after that, and ids that are no expert, are never computed, read or used as an address.

Shapes: B tokens, M slots, E experts, S neurons of one expert, C shared neurons, D hidden size,
H = M*S + C.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaconvert.kernels import triton_support
from adaconvert.kernels.triton_activations import activated

if TYPE_CHECKING:
    from adaconvert.kernels.decode_steps import Call

#: neurons of one program of the first launch, and columns of one step.
_ROWS, _COLUMNS = 16, 256
#: rows of one step of the second launch, and columns of one program.
_DOWN_ROWS, _DOWN_COLUMNS = 64, 128
#: programs that the second launch should have: two for each multiprocessor of an H200.
_PROGRAMS = 264
_MOST_SHARES = 16


@triton.jit
def _hidden_of_rows(
    x, gate, up, gate_bias, up_bias, rows, live,
    gate_row, gate_column, up_row, up_column,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    GLU: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the hidden values of neurons `rows` (int64) of matrices that start at gate and up."""
    up_sum = tl.zeros((ROWS, BLOCK), ACC)
    gate_sum = tl.zeros((ROWS, BLOCK), ACC)
    for start in tl.range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < D
        mask = live[:, None] & inside[None, :]
        wide = columns.to(tl.int64)[None, :]
        value = tl.load(x + columns, mask=inside, other=0).to(ACC)[None, :]
        tile = tl.load(up + rows[:, None] * up_row + wide * up_column, mask=mask, other=0)
        up_sum += tile.to(ACC) * value
        if GLU:
            tile = tl.load(gate + rows[:, None] * gate_row + wide * gate_column, mask=mask, other=0)
            gate_sum += tile.to(ACC) * value
    hidden = tl.sum(up_sum, axis=1)
    if HAS_UP_BIAS:
        hidden += tl.load(up_bias + rows, mask=live, other=0).to(ACC)
    if GLU:
        before = tl.sum(gate_sum, axis=1)
        if HAS_GATE_BIAS:
            before += tl.load(gate_bias + rows, mask=live, other=0).to(ACC)
        hidden = activated(before, ACTIVATION) * hidden
    else:
        hidden = activated(hidden, ACTIVATION)
    return hidden


@triton.jit
def _hidden_kernel(
    x, ids, counts, weights, gate, up, gate_bias, up_bias,
    shared_gate, shared_up, shared_gate_bias, shared_up_bias, out,
    slots, experts, gate_expert, gate_row, gate_column, up_expert, up_row, up_column,
    gate_bias_expert, up_bias_expert,
    shared_gate_row, shared_gate_column, shared_up_row, shared_up_column,
    D: tl.constexpr, S: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_SHARED_GATE_BIAS: tl.constexpr,
    HAS_SHARED_UP_BIAS: tl.constexpr, ACC: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """out[token, slot*S + s], out[token, slots*S + c]: hidden values; grid (blocks, B)."""
    BLOCKS: tl.constexpr = (S + ROWS - 1) // ROWS
    block, token = tl.program_id(0), tl.program_id(1)
    if REVERSE:
        block = tl.num_programs(0) - 1 - block
        token = tl.num_programs(1) - 1 - token
    x += token * D
    out += token.to(tl.int64) * (slots * S + C)
    if block < slots * BLOCKS:
        slot = block // BLOCKS
        expert = tl.load(ids + token * slots + slot).to(tl.int64)
        count = tl.load(counts + token)
        if (slot < count) & (expert >= 0) & (expert < experts):
            rows = (block % BLOCKS) * ROWS + tl.arange(0, ROWS)
            live = rows < S
            hidden = _hidden_of_rows(
                x, gate + expert * gate_expert, up + expert * up_expert,
                gate_bias + expert * gate_bias_expert, up_bias + expert * up_bias_expert,
                rows.to(tl.int64), live, gate_row, gate_column, up_row, up_column,
                D, ROWS, BLOCK, ACTIVATION, GLU, HAS_GATE_BIAS, HAS_UP_BIAS, ACC,
            )  # fmt: skip
            if HAS_WEIGHTS:
                hidden *= tl.load(weights + token * slots + slot).to(ACC)
            tl.store(out + slot * S + rows, hidden, mask=live)
    elif C > 0:
        rows = (block - slots * BLOCKS) * ROWS + tl.arange(0, ROWS)
        live = rows < C
        hidden = _hidden_of_rows(
            x, shared_gate, shared_up, shared_gate_bias, shared_up_bias, rows.to(tl.int64), live,
            shared_gate_row, shared_gate_column, shared_up_row, shared_up_column,
            D, ROWS, BLOCK, ACTIVATION, GLU, HAS_SHARED_GATE_BIAS, HAS_SHARED_UP_BIAS, ACC,
        )  # fmt: skip
        tl.store(out + slots * S + rows, hidden, mask=live)


@triton.jit
def _output_kernel(
    hidden, ids, counts, weights, down, shared_down, down_bias, out_bias, out,
    slots, experts, down_expert, down_row, down_column, shared_row, shared_column, bias_expert,
    D: tl.constexpr, S: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SHARES: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr,
    HAS_OUT_BIAS: tl.constexpr, ACC: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """out[token, share, d]: the share's sum of rows of down; grid (D blocks, B, SHARES)."""
    block, token, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if REVERSE:
        block = tl.num_programs(0) - 1 - block
        token = tl.num_programs(1) - 1 - token
        share = SHARES - 1 - share
    hidden += token.to(tl.int64) * (slots * S + C)
    ids += token * slots
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    wide = columns.to(tl.int64)[None, :]
    used = tl.maximum(tl.minimum(tl.load(counts + token).to(tl.int32), slots), 0)
    total = tl.zeros((ROWS, BLOCK), ACC)
    # loops by while: the interpreter of Triton 3.6 takes no bound that is read from memory
    start = share * ROWS
    while start < used * S:
        flat = start + tl.arange(0, ROWS)
        here = flat < used * S
        expert = tl.load(ids + flat // S, mask=here, other=-1).to(tl.int64)
        live = here & (expert >= 0) & (expert < experts)
        value = tl.load(hidden + flat, mask=live, other=0)
        rows = expert * down_expert + (flat % S).to(tl.int64) * down_row
        mask = live[:, None] & inside[None, :]
        tile = tl.load(down + rows[:, None] + wide * down_column, mask=mask, other=0)
        total += tile.to(ACC) * value[:, None]
        start += SHARES * ROWS
    if C > 0:
        for first in tl.range(0, C, SHARES * ROWS):
            flat = first + share * ROWS + tl.arange(0, ROWS)
            live = flat < C
            value = tl.load(hidden + slots * S + flat, mask=live, other=0)
            rows = flat.to(tl.int64) * shared_row
            mask = live[:, None] & inside[None, :]
            tile = tl.load(shared_down + rows[:, None] + wide * shared_column, mask=mask, other=0)
            total += tile.to(ACC) * value[:, None]
    result = tl.sum(total, axis=0)
    if HAS_DOWN_BIAS:
        slot = share
        while slot < used:
            expert = tl.load(ids + slot).to(tl.int64)
            if (expert >= 0) & (expert < experts):
                bias = tl.load(down_bias + expert * bias_expert + columns, mask=inside, other=0)
                factor = 1.0
                if HAS_WEIGHTS:
                    factor = tl.load(weights + token * slots + slot).to(ACC)
                result += bias.to(ACC) * factor
            slot += SHARES
    if HAS_OUT_BIAS:  # noqa: SIM102 - Triton resolves this one when it compiles
        if share == 0:
            result += tl.load(out_bias + columns, mask=inside, other=0).to(ACC)
    tl.store(out + (token * SHARES + share).to(tl.int64) * D + columns, result, mask=inside)


@triton.jit
def _sum_kernel(
    parts, out, D: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr, REVERSE: tl.constexpr
):
    """out[token, d] = sum over shares of parts[token, share, d]; grid (D blocks, B)."""
    block, token = tl.program_id(0), tl.program_id(1)
    if REVERSE:
        block = tl.num_programs(0) - 1 - block
        token = tl.num_programs(1) - 1 - token
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    shares = tl.arange(0, SHARES)
    found = tl.load(
        parts + (token * SHARES + shares[:, None]).to(tl.int64) * D + columns[None, :],
        mask=inside[None, :],
        other=0,
    )
    tl.store(out + token.to(tl.int64) * D + columns, tl.sum(found, axis=0), mask=inside)


@triton.jit
def _compact_kernel(
    mask, factors, ids, counts, weights, experts, mask_token, mask_expert, factors_token,
    factors_expert, BLOCK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """ids[token, :n]: the experts of the mask in order, counts[token] = n; grid (B,)."""
    token = tl.program_id(0)
    if REVERSE:
        token = tl.num_programs(0) - 1 - token
    expert = tl.arange(0, BLOCK)
    wide = expert.to(tl.int64)
    here = expert < experts
    row = token.to(tl.int64)
    value = tl.load(mask + row * mask_token + wide * mask_expert, mask=here, other=0)
    chosen = (value != 0).to(tl.int32)
    place = tl.cumsum(chosen, axis=0) - chosen
    runs = here & (chosen != 0)
    tl.store(ids + row * experts + place, expert, mask=runs)
    tl.store(counts + token, tl.sum(chosen, axis=0))
    if HAS_WEIGHTS:
        given = tl.load(factors + row * factors_token + wide * factors_expert, mask=runs, other=0)
        tl.store(weights + row * experts + place, given, mask=runs)


def run(call: Call, *, reverse: bool = False, shares: int | None = None) -> Tensor:
    """Return what `decode.dynk_decode` does, [B, D].

    Args:
        call: its tensors.
        reverse: run the programs in the opposite order; the result is the same.
        shares: into how many the second launch splits the rows, a power of two; None by sizes.
    """
    if not len(call.x):
        return torch.empty_like(call.x)
    with torch.cuda.device_of(call.x):  # type: ignore[no-untyped-call]
        return _launch(_contiguous(call), reverse, shares)


def compact(
    mask: Tensor, factors: Tensor | None, *, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ids [B, E], counts [B] and factors [B, E] of the experts of a mask, in order.

    Args:
        mask: [B, E] bool.
        factors: [B, E] or None.
        reverse: as of `run`.
    """
    tokens, experts = mask.shape
    ids = torch.empty(tokens, experts, dtype=torch.int32, device=mask.device)
    counts = torch.empty(tokens, dtype=torch.int32, device=mask.device)
    found = (
        None
        if factors is None
        else torch.empty(mask.shape, dtype=factors.dtype, device=mask.device)
    )
    if not tokens:
        return ids, counts, found
    bytes_of = mask.view(torch.uint8)
    given = bytes_of if factors is None else factors
    with torch.cuda.device_of(mask):  # type: ignore[no-untyped-call]
        _compact_kernel[(tokens,)](
            bytes_of, given, ids, counts, ids if found is None else found, experts,
            *bytes_of.stride(), *given.stride(),
            BLOCK=triton.next_power_of_2(experts), HAS_WEIGHTS=found is not None, REVERSE=reverse,
            enable_fp_fusion=True,
        )  # fmt: skip
    return ids, counts, found


def _launch(call: Call, reverse: bool, shares: int | None) -> Tensor:
    tokens, width = call.x.shape
    wide = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    rows = call.ids.shape[1] * call.up.shape[1] + _shared(call)
    hidden = torch.empty(tokens, rows, dtype=wide, device=call.x.device)
    if rows:
        _launch_hidden(call, hidden, reverse)
    out = torch.empty(tokens, width, dtype=call.x.dtype, device=call.x.device)
    shares = shares or _shares(tokens, width, rows)
    if shares == 1:
        _launch_output(call, hidden, out, shares, reverse)
        return out
    parts = torch.empty(tokens, shares, width, dtype=wide, device=call.x.device)
    _launch_output(call, hidden, parts, shares, reverse)
    block = _block(width, _DOWN_COLUMNS)
    _sum_kernel[(triton.cdiv(width, block), tokens)](
        parts, out, D=width, BLOCK=block, SHARES=shares, REVERSE=reverse, enable_fp_fusion=True
    )
    return out


def _launch_hidden(call: Call, hidden: Tensor, reverse: bool) -> None:
    neurons, shared = call.up.shape[1], _shared(call)
    rows = min(_ROWS, triton.next_power_of_2(max(neurons, shared)))
    blocks = call.ids.shape[1] * triton.cdiv(neurons, rows) + triton.cdiv(shared, rows)
    gate, up = call.gate, call.up
    shared_gate = _or(call.shared_gate, call.shared_up, up[:0, 0])
    shared_up = _or(call.shared_up, up[:0, 0])
    _hidden_kernel[(blocks, call.x.shape[0])](
        call.x, call.ids, call.counts, _or(call.weights_of, call.x), _or(gate, up), up,
        _or(call.gate_bias, up), _or(call.up_bias, up), shared_gate, shared_up,
        _or(call.shared_gate_bias, up), _or(call.shared_up_bias, up), hidden,
        call.ids.shape[1], up.shape[0], *_or(gate, up).stride(), *up.stride(),
        _stride(call.gate_bias), _stride(call.up_bias), *shared_gate.stride(), *shared_up.stride(),
        D=call.x.shape[1], S=neurons, C=shared, ROWS=rows, BLOCK=_block(call.x.shape[1], _COLUMNS),
        ACTIVATION=call.activation, GLU=gate is not None, HAS_WEIGHTS=call.weights_of is not None,
        HAS_GATE_BIAS=call.gate_bias is not None, HAS_UP_BIAS=call.up_bias is not None,
        HAS_SHARED_GATE_BIAS=call.shared_gate_bias is not None,
        HAS_SHARED_UP_BIAS=call.shared_up_bias is not None,
        ACC=triton_support.accumulator(call.x.dtype), REVERSE=reverse, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def _launch_output(call: Call, hidden: Tensor, parts: Tensor, shares: int, reverse: bool) -> None:
    tokens, width = call.x.shape
    down = call.down_rows
    shared_down = _or(call.shared_down_rows, down[:0, 0])
    block = _block(width, _DOWN_COLUMNS)
    _output_kernel[(triton.cdiv(width, block), tokens, shares)](
        hidden, call.ids, call.counts, _or(call.weights_of, call.x), down, shared_down,
        _or(call.down_bias, down), _or(call.out_bias, down), parts, call.ids.shape[1],
        down.shape[0], *down.stride(), *shared_down.stride(), _stride(call.down_bias),
        D=width, S=down.shape[1], C=_shared(call), ROWS=_DOWN_ROWS, BLOCK=block, SHARES=shares,
        HAS_WEIGHTS=call.weights_of is not None, HAS_DOWN_BIAS=call.down_bias is not None,
        HAS_OUT_BIAS=call.out_bias is not None, ACC=triton_support.accumulator(call.x.dtype),
        REVERSE=reverse, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _contiguous(call: Call) -> Call:
    """Return the call with its small tensors as the kernels address them; no weight is copied."""
    whole = ("x", "ids", "counts", "weights_of", "out_bias", "shared_gate_bias", "shared_up_bias")
    rows = ("gate_bias", "up_bias", "down_bias")
    found: dict[str, Any] = {name: getattr(call, name) for name in (*whole, *rows)}
    for name, tensor in found.items():
        if tensor is not None and (name in whole or tensor.stride(1) != 1):
            found[name] = tensor.contiguous()
    return call._replace(**found)


def _shares(tokens: int, width: int, rows: int) -> int:
    """Return into how many shares the rows of the down matrices are split, a power of two."""
    programs = tokens * triton.cdiv(width, _DOWN_COLUMNS)
    most = max(1, min(_MOST_SHARES, _PROGRAMS // programs, triton.cdiv(rows, _DOWN_ROWS)))
    return 1 << (int(most).bit_length() - 1)


def _block(size: int, most: int) -> int:
    return min(most, int(triton.next_power_of_2(size)))


def _shared(call: Call) -> int:
    return 0 if call.shared_up is None else call.shared_up.shape[0]


def _or(*tensors: Tensor | None) -> Tensor:
    """Return the first tensor there is: what a kernel is told not to read must be one too."""
    return next(tensor for tensor in tensors if tensor is not None)


def _stride(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.stride(0)
