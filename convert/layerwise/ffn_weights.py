"""One dense feed-forward network as plain matrices, and what its neurons and experts contribute.

Shapes: T tokens, H hidden size, I neurons, E experts, M = expert width, S shared neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.sites import ffn_site
from adaconvert.errors import OptionError
from adaconvert.io.names import escape

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import nn

    Order = numpy.ndarray[Any, numpy.dtype[numpy.int64]]

#: values of one intermediate tensor computed at a time, 64 MiB in float32.
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnWeights:
    """The matrices of a feed-forward network, rows as in `nn.Linear` whatever the family stores.

    Attributes:
        gate: [I, H]; None for a plain FFN.
        up: [I, H].
        down: [H, I].
        gate_bias, up_bias: [I] or None.
        down_bias: [H] or None; belongs to no neuron.
        activation: applied to the gate, or to `up` of a plain FFN.
    """

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: Callable[[torch.Tensor], torch.Tensor]

    @property
    def neurons(self) -> int:
        """Return I."""
        return int(self.up.shape[0])

    @property
    def first(self) -> torch.Tensor:
        """Return the matrix the activation follows, gate or plain `up`, [I, H]."""
        return self.up if self.gate is None else self.gate

    def activated(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return act(gate x), of a plain FFN act(up x); [T, H] -> [T, I]."""
        from torch.nn.functional import linear

        bias = self.up_bias if self.gate is None else self.gate_bias
        return self.activation(linear(inputs, self.first, bias))

    def hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what the down projection receives: act(gate x) * up x, [T, H] -> [T, I]."""
        from torch.nn.functional import linear

        activated = self.activated(inputs)
        if self.gate is None:
            return activated
        return activated * linear(inputs, self.up, self.up_bias)

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the FFN's output for hidden activations, [T, I] -> [T, H]."""
        from torch.nn.functional import linear

        return linear(hidden, self.down, self.down_bias)

    def neuron_norms(self) -> torch.Tensor:
        """Return the length of each neuron's output weights, [I]."""
        import torch

        norms: torch.Tensor = torch.linalg.vector_norm(self.down, dim=0)
        return norms

    def chunk(self, width: int | None = None) -> int:
        """Return how many tokens to compute at a time so that [T, `width` or I] stays small."""
        return max(_CHUNK // max(width or self.neurons, 1), 16)


def ffn_weights(module: nn.Module, spec: ModelSpec, index: int) -> FfnWeights:
    """Return the FFN of a loaded block in float32.

    Args:
        module: the stock block, or the whole model's part that holds names after the block number.
        spec: the checkpoint's description.
        index: which block it is in the whole model.

    Raises:
        OptionError: the block holds a mixture of experts, or an unknown activation.
    """
    found = _stored(module, spec, index)
    if "gate_up" in found:
        half = found["gate_up"].shape[0] // 2
        found["gate"], found["up"] = found["gate_up"][:half], found["gate_up"][half:]
    if "up" not in found or "down" not in found:
        raise OptionError(
            f"block {index} has no dense feed-forward network", where=escape(spec.model_type)
        )
    return FfnWeights(
        gate=found.get("gate"),
        up=found["up"],
        down=found["down"],
        gate_bias=found.get("gate_bias"),
        up_bias=found.get("up_bias"),
        down_bias=found.get("down_bias"),
        activation=activation_of(spec),
    )


_ROLES = frozenset({"gate", "up", "down", "gate_up", "gate_bias", "up_bias", "down_bias"})


def _stored(module: nn.Module, spec: ModelSpec, index: int) -> dict[str, torch.Tensor]:
    parameters: Mapping[str, torch.Tensor] = dict(module.named_parameters())
    found = {}
    for tensor in spec.tensors:
        if tensor.layer != index or tensor.role not in _ROLES:
            continue
        weight = parameters.get(_in_memory(spec, tensor, index))
        if weight is not None:
            value = weight.detach().float()
            found[tensor.role] = value.T if tensor.transposed else value
    return found


def _in_memory(spec: ModelSpec, tensor: TensorSpec, index: int) -> str:
    """Return the name of a tensor of the network inside its loaded block; transformers loads some
    families' networks under other names than the stored ones."""
    site = ffn_site(spec, index)
    role = tensor.role.removesuffix("_bias")
    if role not in site.weights:
        return inside_block(tensor.name, index)
    kind = tensor.name.rsplit(".", 1)[1]
    return f"{ffn_path(spec, index)}.{site.weights[role]}.{kind}"


def inside_block(name: str, index: int) -> str:
    """Return the name a tensor of block `index` has inside that block."""
    return f".{name}".split(f".{index}.", 1)[1]


def ffn_path(spec: ModelSpec, index: int) -> str:
    """Return the FFN module's path inside its block, "mlp" in most families."""
    return inside_block(ffn_site(spec, index).path, index)


def activation_of(spec: ModelSpec) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the FFN's activation function.

    Raises:
        OptionError: transformers knows no activation of that name.
    """
    from transformers.activations import ACT2FN

    name = spec.traits.activation
    try:
        function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    except KeyError:
        raise OptionError(
            f"unknown activation {escape(str(name), 60)}", where="config.json"
        ) from None
    return function


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNorms:
    """The lengths of the experts' outputs for one partition of one FFN.

    The output of expert e is D_e h_e with D_e [H, M]; its length is that of R_e h_e with D_e = Q R,
    which takes M instead of H multiplications per neuron.

    Attributes:
        order: neurons of the routed experts in the partition's order, [E * M].
        factors: R of each expert, [E, min(H, M), M].
    """

    order: torch.Tensor
    factors: torch.Tensor

    @staticmethod
    def of(weights: FfnWeights, order: Order, *, width: int, shared: int = 0) -> ExpertNorms:
        """Return the norms of the partition `order` [I] into experts of `width` after `shared`."""
        import torch

        routed = torch.from_numpy(order[shared:]).to(weights.down.device)
        columns = weights.down.T[routed].reshape(-1, width, weights.down.shape[0])
        if width == 1:
            factors = columns.norm(dim=2, keepdim=True)
        else:
            factors = torch.linalg.qr(columns.transpose(1, 2), mode="r").R
        return ExpertNorms(order=routed, factors=factors)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return ||E_e(x)||_2 without output bias, [T, I] -> [T, E]."""
        import torch

        experts, _, width = self.factors.shape
        split = hidden[:, self.order].reshape(len(hidden), experts, width)
        if width == 1:
            return split[:, :, 0].abs() * self.factors[:, 0, 0]
        # [E, T, M] @ [E, M, R] -> [E, T, R]
        rotated = split.transpose(0, 1) @ self.factors.transpose(1, 2)
        norms: torch.Tensor = torch.linalg.vector_norm(rotated, dim=2)
        return norms.T
