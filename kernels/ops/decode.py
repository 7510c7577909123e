"""One to a few tokens through the experts each of them selects, reading no other expert's weights.

For inference. Triton's kernels read the weights of the selected experts once per token and nothing
else (`triton_decode`); torch's form computes every expert and leaves the others out of the sum,
which costs what a dense network does. Neither synchronises with the host.

Shapes: B tokens, M slots, E experts, S neurons of one expert, C shared neurons, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaconvert.kernels import decode_steps
from adaconvert.kernels.decode_steps import Call
from adaconvert.kernels.expert_activations import Activation
from adaconvert.kernels.experts import activation_of
from adaconvert.kernels.reference import expert_ffn as expert_ffn_by_torch

#: experts whose numbers one program lists.
MOST_EXPERTS = 4096


class Neurons(NamedTuple):
    """Neurons that every token runs, with weight one.

    Attributes:
        up: [C, D].
        down_rows: [C, D], the down matrix by rows of neurons.
        gate: [C, D], None for experts without.
        up_bias, gate_bias: [C] or None.
    """

    up: Tensor
    down_rows: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None


def dynk_decode(
    x: Tensor,
    ids: Tensor,
    counts: Tensor,
    *,
    down_rows: Tensor,
    activation: Activation,
    glu: bool,
    gate_up: Tensor | None = None,
    up: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    weights_of: Tensor | None = None,
    shared: Neurons | None = None,
) -> Tensor:
    """Return the sum of the outputs of each token's experts, [B, D], of the dtype of x.

    An expert computes down(act(gate x) * up x) with `glu`, down(act(up x)) without. A token's
    experts are the first `counts` of its `ids`; an id below 0 or from E on is none.

    Args:
        x: [B, D].
        ids: [B, M] int32 or int64.
        counts: [B] int32 or int64.
        down_rows: [E, S, D], the down matrices by rows of neurons.
        activation: of the gate, or of `up` without one.
        glu: whether experts have a gate.
        gate_up: [E, 2S, D] with `glu`, gate first.
        up: [E, S, D] without `glu`.
        gate_up_bias: [E, 2S].
        up_bias: [E, S].
        down_bias: [E, D], part of the experts' outputs.
        out_bias: [D], added once.
        weights_of: [B, M] factor of each expert's output; one when not given.
        shared: neurons that always run.

    Raises:
        ValueError: shapes disagree, tensors of the other form of expert are given, or the
            activation is unknown.
        TypeError: dtypes disagree.
        RuntimeError: a gradient is asked for, or ADACONVERT_KERNELS is "triton" and it cannot run.

    Source: the selection is D2DMoE, Szatkowski et al. 2024, arXiv 2310.04361, section 3.
    """
    (first, bias), unused = (gate_up, gate_up_bias), (up, up_bias)
    if not glu:
        (first, bias), unused = unused, (gate_up, gate_up_bias)
    gated = shared is not None and shared.gate is not None
    wrong = first is None or any(tensor is not None for tensor in unused)
    if first is None or wrong or (shared is not None and gated != glu):
        raise ValueError(f"experts {'with' if glu else 'without'} a gate need {_NEEDS[glu]}")
    gate, last = first.chunk(2, dim=1) if glu else (None, first)
    biases = bias.chunk(2, dim=1) if glu and bias is not None else (None, bias)
    call = Call(
        x=x,
        ids=ids,
        counts=counts,
        gate=gate,
        up=last,
        down_rows=down_rows,
        gate_bias=biases[0],
        up_bias=biases[1],
        down_bias=down_bias,
        out_bias=out_bias,
        weights_of=weights_of,
        shared_gate=None if shared is None else shared.gate,
        shared_up=None if shared is None else shared.up,
        shared_down_rows=None if shared is None else shared.down_rows,
        shared_gate_bias=None if shared is None else shared.gate_bias,
        shared_up_bias=None if shared is None else shared.up_bias,
        activation=activation,
    )
    decode_steps.check(call)
    return decode_steps.run(call)


def expert_ffn(
    x: Tensor,
    mask: Tensor,
    *,
    up: Tensor,
    down: Tensor,
    width: int,
    activation: Callable[[Tensor], Tensor],
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared: int = 0,
    gated: Tensor | None = None,
    weights_per_expert: Tensor | None = None,
) -> Tensor:
    """Return what `reference.expert_ffn` does, by the kernels of `dynk_decode`.

    No weight is copied, since the kernels take any strides. They read d numbers in one piece where
    a neuron's column of `down` is one (`adaptive_layout.pack`), m numbers in [d, f] by rows as
    checkpoints hold it: a piece of 64 bytes for 32 neurons of 16 bits.

    `gated` is not used: the selected experts' part of the gate is read again. An activation that
    the kernels do not know, and what are not plain tensors, run by torch.
    """
    name = activation_of(activation)
    if name is None or not all(type(t) in (Tensor, nn.Parameter) for t in (x, mask, up, down)):
        options = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
        more = {"shared": shared, "gated": gated, "weights_per_expert": weights_per_expert}
        given: dict[str, Any] = {"up": up, "down": down, "gate": gate, **options, **more}
        return expert_ffn_by_torch(x, mask, width=width, activation=activation, **given)
    from adaconvert.kernels import triton_decode

    ids, counts, factors = triton_decode.compact(mask, weights_per_expert)
    parts = [_parts(t, shared, width) for t in (gate, up, down.t(), gate_bias, up_bias)]
    always, experts = zip(*parts, strict=True)
    tensors: list[Any] = [x, ids, counts, *experts, None, down_bias, factors, *always, name]
    return triton_decode.run(Call(*tensors))


def _parts(neurons: Tensor | None, shared: int, width: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the shared neurons, [C, ...], and those of the experts, [E, S, ...], as views."""
    if neurons is None:
        return None, None
    experts = (neurons.shape[0] - shared) // width
    routed = neurons[shared:].view(experts, width, *neurons.shape[1:])
    return neurons[:shared] if shared else None, routed


def refuses_expert_ffn(facts: dict[str, Any]) -> str | None:
    """Return why `expert_ffn` cannot run a call of these facts, None when it can."""
    if not 0 < facts["experts"] <= MOST_EXPERTS:
        return f"{facts['experts']} experts; it lists 1 to {MOST_EXPERTS}"
    if torch.is_autocast_enabled(facts["device"]):
        return "autocast is on"
    if "activation" in facts and activation_of(facts["activation"]) is None:
        return f"it does not know the activation {facts['activation']!r}"
    return None


def refuses_dynk_decode(facts: dict[str, Any]) -> str | None:
    """Return why the kernels cannot run a call of these facts, None when they can."""
    return "experts have no neurons" if 0 in (facts["width"], facts["hidden"]) else None


#: what `dispatch` runs for "dynk_decode".
by_triton = decode_steps.by_triton

_NEEDS = {
    True: "gate_up, no up, and a gate of shared neurons",
    False: "up, no gate_up, and no gate of shared neurons",
}
