"""What `dynk_decode` computes: a loop over tokens and their experts, in any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from adaconvert.kernels.decode_steps import Call, activate


def dynk_decode(call: Call) -> Tensor:
    """Return the output of each token's experts and of the shared neurons, [B, D].

    Source: D2DMoE, Szatkowski et al. 2024, arXiv 2310.04361, section 3 (experts of weight one).
    """
    out = torch.zeros_like(call.x)
    for token, count in enumerate(call.counts.tolist()):
        x = call.x[token]
        if call.out_bias is not None:
            out[token] += call.out_bias
        if call.shared_up is not None and call.shared_down_rows is not None:
            gate = (
                None
                if call.shared_gate is None
                else linear(x, call.shared_gate, call.shared_gate_bias)
            )
            up = linear(x, call.shared_up, call.shared_up_bias)
            out[token] += activate(gate, up, call.activation) @ call.shared_down_rows
        for slot in range(min(count, call.ids.shape[1])):
            expert = int(call.ids[token, slot])
            if 0 <= expert < call.up.shape[0]:
                factor = 1 if call.weights_of is None else call.weights_of[token, slot]
                out[token] += factor * _expert(x, expert, call)
    return out


def _expert(x: Tensor, expert: int, call: Call) -> Tensor:
    def before(matrices: Tensor, biases: Tensor | None) -> Tensor:
        return linear(x, matrices[expert], None if biases is None else biases[expert])

    gate = None if call.gate is None else before(call.gate, call.gate_bias)
    hidden = activate(gate, before(call.up, call.up_bias), call.activation)
    out = hidden @ call.down_rows[expert]
    return out if call.down_bias is None else out + call.down_bias[expert]
