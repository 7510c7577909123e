"""What every attention projection of a model receives on given tokens, block by block.

    for layer in projection_layers(folder, tokens, roles=("q", "v")):
        x = layer.inputs["q"]                          # [T, d]
        layer.matrices["q"](x)                         # [T, o]: what the model's projection gives

Shapes: T unpadded tokens, d inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaconvert.arch.base import ModelSpec
from adaconvert.arch.projections import (
    Network,
    ProjectionSite,
    networks_of,
    projection_sites,
    stock_spec,
)
from adaconvert.io.source import Source
from adaconvert.layerwise.dense_view import dense_view
from adaconvert.layerwise.ffn_weights import FfnWeights, inside_block
from adaconvert.layerwise.runner import LayerwiseModel
from adaconvert.layerwise.states import IN_MEMORY, States, Tokens, checked, decoder_of, run_block
from adaconvert.layerwise.work import WorkFolder
from adaconvert.progress import bar

if TYPE_CHECKING:
    import torch
    from torch import nn

#: projections of one input have one copy of it.
_SHARED = {"q": "attention", "k": "attention", "v": "attention", "o": "heads"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One projection.

    Attributes:
        weight: float32 [o, d].
        bias: float32 [o] or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return its outputs, [T, d] -> [T, o]."""
        from torch.nn.functional import linear

        return linear(inputs, self.weight, self.bias)


@dataclass(slots=True, kw_only=True)
class ProjectionLayer:
    """The projections of one block, and what they receive; valid until the next is asked for.

    Attributes:
        index: of the block.
        inputs: float32 [T, d] by role, unpadded tokens in the order of the token blocks.
        matrices: by role, of those that are matrices.
        networks: by role, of those a network has taken the place of.
    """

    index: int
    inputs: Mapping[str, torch.Tensor]
    matrices: Mapping[str, Matrix]
    networks: Mapping[str, FfnWeights]


def projection_layers(
    where: Path | Source,
    tokens: Tokens,
    *,
    roles: Sequence[str],
    layers: Collection[int],
    work: WorkFolder | None = None,
    memory: int = IN_MEMORY,
    device: str = "cpu",
    progress: bool = False,
) -> Iterator[ProjectionLayer]:
    """Yield the projections of each block with their inputs, in order.

    An adaptive checkpoint runs with every neuron on.

    Args:
        where: a decoder checkpoint, dense or adaptive.
        tokens: what to run it on.
        roles: which projections, of `arch.projections.ROLES`.
        layers: blocks to yield.
        work, memory, device, progress: as for `ffn_data.ffn_layers`.

    Raises:
        OptionError: the model is no decoder, or the tokens do not fit it.
        SourceError: the checkpoint cannot be read, or its hidden states are not finite.
        ResourceError: the states need more than `memory` and there is no work folder.
    """
    model = LayerwiseModel(dense_view(where))
    spec = decoder_of(model.source, "projections")
    ids, kept = checked(tokens, spec)
    if not layers or (work is not None and work.next_block > max(layers)):
        return
    rooms = len({_SHARED[role] for role in roles})
    states = States(ids, kept, spec.hidden, "float32", work, memory, device, rooms)
    start = states.begin(model)
    todo = range(start, max(layers) + 1)
    with bar(len(todo) * len(states), "layers", "blocks", enabled=progress) as shown:
        for block in model.blocks(start):
            block.to(device)
            wanted = tuple(roles) if block.index in layers else ()
            found = _modules(block.module, spec, block.index, wanted)
            watched = {_SHARED[role]: module for role, module in found.items()}
            inputs = run_block(block, states, watched, shown)
            if wanted:
                yield _layer(spec, block.index, found, inputs, device)
            states.advance(block.index)
            if block.index == max(layers):
                return


def _modules(
    module: nn.Module, spec: ModelSpec, index: int, roles: Sequence[str]
) -> dict[str, nn.Module]:
    """Return the modules of a block's projections by role."""
    sites = projection_sites(stock_spec(spec)).values()
    return {
        site.role: module.get_submodule(inside_block(site.stored, index))
        for site in sites
        if site.layer == index and site.role in roles
    }


def _layer(
    spec: ModelSpec,
    index: int,
    modules: Mapping[str, nn.Module],
    inputs: Mapping[str, torch.Tensor],
    device: str,
) -> ProjectionLayer:
    replaced = {
        site.role: network
        for site, network in networks_of(stock_spec(spec), spec.adaptive or {})
        if site.layer == index
    }
    sites = {
        site.role: site
        for site in projection_sites(stock_spec(spec)).values()
        if site.layer == index
    }
    arrived = {name: tensor.to(device) for name, tensor in inputs.items()}
    return ProjectionLayer(
        index=index,
        inputs={role: arrived[_SHARED[role]] for role in modules},
        matrices={
            role: _matrix(module, sites[role])
            for role, module in modules.items()
            if role not in replaced
        },
        networks={
            role: _network(modules[role], network)
            for role, network in replaced.items()
            if role in modules
        },
    )


def _matrix(module: nn.Module, site: ProjectionSite) -> Matrix:
    own = {name: value.detach().float() for name, value in module.named_parameters()}
    weight = own["weight"].T if site.transposed else own["weight"]
    return Matrix(weight=weight, bias=own.get("bias"))


def _network(module: nn.Module, network: Network) -> FfnWeights:
    from transformers.activations import ACT2FN

    own = {name: value.detach().float() for name, value in module.named_parameters()}
    return FfnWeights(
        gate=None,
        up=own["up.weight"],
        down=own["down.weight"],
        gate_bias=None,
        up_bias=own.get("up.bias"),
        down_bias=own.get("down.bias"),
        activation=ACT2FN[network.activation],
    )
