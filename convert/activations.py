"""`inspect --activations`: how sparse a model's feed-forward networks really are on a text.

Shapes: T tokens, I neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

from adaconvert.arch.base import ModelSpec
from adaconvert.arch.registry import describe
from adaconvert.errors import OptionError
from adaconvert.io.source import Source
from adaconvert.layerwise.configs import load_config
from adaconvert.layerwise.dense_view import dense_view
from adaconvert.layerwise.ffn_data import FfnLayer, ffn_layers

if TYPE_CHECKING:
    import torch

    from adaconvert.data.tokens import TokenBlocks

#: |a| below this fraction of the token's largest counts as small.
FRACTIONS = (10, 100, 1000)
#: shares of the output mass that neurons are counted for.
MASSES = (0.9, 0.95, 0.99)
#: a model with at least this share of exact zeros is one D2DMoE and MoEfication were made for.
SPARSE_ENOUGH = 0.5
#: neurons of the runs that are compared with single ones.
GROUP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationOptions:
    """What activations are measured on.

    Attributes:
        field, split: of the data, see `data.text.read_documents`.
        max_tokens: tokens to run.
        length: tokens of a block.
        seed: of the order in which documents are taken.
    """

    field: str = "text"
    split: str | None = None
    max_tokens: int = 4096
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "length"):
            if getattr(self, name) < 2:
                where = "--" + name.replace("_", "-")
                raise OptionError(
                    "out of range", where=where, expected="2 or more", found=getattr(self, name)
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivations:
    """What one feed-forward network's hidden units look like, mean over tokens.

    Hidden units are what the down projection receives: act(gate x) * up x, or act(up x).

    Attributes:
        layer: index of the block.
        zeros: share that is exactly zero.
        below: share whose magnitude is below 1/10, 1/100, 1/1000 of the token's largest.
        hoyer: (sum |a|)^2 / (sum a^2) / I: 1 when all neurons are equally active, 1/I when one is.
        neurons: share of the neurons that hold 90, 95, 99 % of the token's output mass, the sum of
            (a_j ||down_j||)^2.
        half: share of the output mass that the best half of the neurons holds.
        half_in_groups: the same when neurons are taken in runs of 32 as they stand; what experts
            lose that do not group neurons by when they are active.
    """

    layer: int
    zeros: float
    below: tuple[float, ...]
    hoyer: float
    neurons: tuple[float, ...]
    half: float
    half_in_groups: float

    def to_json(self) -> dict[str, object]:
        """Return the numbers as JSON data."""
        return {
            "layer": self.layer,
            "exact_zeros": self.zeros,
            "below": {f"max/{n}": v for n, v in zip(FRACTIONS, self.below, strict=True)},
            "hoyer": self.hoyer,
            "neurons_for": {f"{m:.0%}": v for m, v in zip(MASSES, self.neurons, strict=True)},
            "mass_of_best_half": self.half,
            "mass_of_best_half_in_groups": self.half_in_groups,
        }

    def row(self) -> str:
        """Return the numbers as a row of the table."""
        numbers = (self.zeros, *self.below, self.hoyer, *self.neurons)
        return f"{self.layer:>5}" + "".join(f"{value:>9.1%}" for value in numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationReport:
    """How sparse a model's feed-forward networks are.

    Attributes:
        label: hub id or folder name.
        activation: transformers name.
        gated: the network multiplies by a second projection (SwiGLU, GeGLU, ReGLU).
        tokens: what the numbers are means over.
        layers: in order.
    """

    label: str
    activation: str
    gated: bool
    tokens: int
    layers: tuple[LayerActivations, ...]

    @property
    def mean(self) -> LayerActivations:
        """Return the mean of all layers, under the number of layers."""
        count = len(self.layers)

        def mean(values: Iterator[float]) -> float:
            return sum(values) / count

        return LayerActivations(
            layer=count,
            zeros=mean(layer.zeros for layer in self.layers),
            below=tuple(
                mean(layer.below[i] for layer in self.layers) for i in range(len(FRACTIONS))
            ),
            hoyer=mean(layer.hoyer for layer in self.layers),
            neurons=tuple(
                mean(layer.neurons[i] for layer in self.layers) for i in range(len(MASSES))
            ),
            half=mean(layer.half for layer in self.layers),
            half_in_groups=mean(layer.half_in_groups for layer in self.layers),
        )

    def verdict(self) -> list[str]:
        """Return what the numbers mean for a conversion, one sentence each."""
        mean, kind = self.mean, _kind(self.activation, self.gated)
        if mean.zeros >= SPARSE_ENOUGH:
            return [
                f"{kind}: {mean.zeros:.0%} of the hidden units are exactly zero, so skipping them "
                "costs nothing; `d2dmoe` and `moefy` fit this model as it is.",
                f"The most active half of the neurons holds {mean.half:.1%} of the output mass "
                f"when each is taken alone, {mean.half_in_groups:.1%} in runs of {GROUP} as they "
                "stand; clustering lies between the two.",
            ]
        return [
            f"{kind}: {_zeros(mean.zeros)}; a token's activity is spread as over {mean.hoyer:.0%} "
            "equally active neurons (square-Hoyer measure).",
            "An oracle that keeps the best half of the neurons of each token keeps "
            f"{mean.half:.1%} of the output mass; one that keeps half in runs of {GROUP} as they "
            f"stand keeps {mean.half_in_groups:.1%}. {mean.neurons[2]:.0%} of the neurons are "
            "needed for 99 %.",
            "Experts of many neurons will lose quality without training for sparsity (stage 1 of "
            "D2DMoE). To save compute without training, choose single neurons: `adaconvert moefy "
            "--expert-width 1 --router gate`, then `adaconvert calibrate`.",
        ]

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON data."""
        return {
            "label": self.label,
            "activation": self.activation,
            "gated": self.gated,
            "tokens": self.tokens,
            "layers": [layer.to_json() for layer in self.layers],
            "mean": {k: v for k, v in self.mean.to_json().items() if k != "layer"},
            "verdict": self.verdict(),
        }

    def lines(self) -> list[str]:
        """Return the report as text."""
        names = ["zero", *(f"<max/{n}" for n in FRACTIONS), "hoyer"]
        names += [f"{mass:.0%}" for mass in MASSES]
        return [
            f"{self.label}: {_kind(self.activation, self.gated)}, {len(self.layers)} layers, "
            f"{self.tokens} tokens",
            "share of hidden units that are zero or small, square-Hoyer measure, and share of",
            "neurons that holds 90, 95 and 99 % of the output mass of a token",
            "layer" + "".join(f"{name:>9}" for name in names),
            *(layer.row() for layer in self.layers),
            " mean" + self.mean.row()[5:],
            "",
            *(line for sentence in self.verdict() for line in wrap(sentence, 100)),
        ]


_GLU = {"silu": "SwiGLU", "swish": "SwiGLU", "relu": "ReGLU"}


def _kind(activation: str, gated: bool) -> str:
    if gated:
        name = "GeGLU" if activation.startswith("gelu") else _GLU.get(activation)
        return f"{name} ({activation})" if name else f"gated {activation}"
    return activation


def _zeros(share: float) -> str:
    return "no exact zeros" if share < 0.005 else f"only {share:.0%} exact zeros"


def measure_activations(
    where: str, data: str, options: ActivationOptions, *, progress: bool = False
) -> ActivationReport:
    """Return how sparse the activations of a model are on a text; see `api.inspect_activations`."""
    source = dense_view(Source.open(where))
    spec = describe(source.config, source.tensors)
    tokens = _tokens(source, spec, data, options)
    layers = ffn_layers(source, tokens, progress=progress)
    return report_of(source.label, spec, [measure_layer(layer) for layer in layers], tokens.tokens)


def _tokens(source: Source, spec: ModelSpec, data: str, options: ActivationOptions) -> TokenBlocks:
    """Return the text, or the images, to run the model on."""
    if spec.kind == "vision":
        from adaconvert.data.images import image_blocks, read_images

        images = read_images(
            data, source.root, load_config(source), field=options.field, split=options.split
        )
        return image_blocks(images, max_tokens=options.max_tokens, seed=options.seed)
    from adaconvert.data.text import read_documents
    from adaconvert.data.tokens import token_blocks

    return token_blocks(
        read_documents(data, field=options.field, split=options.split),
        source.root,
        length=min(options.length, spec.max_positions or options.length),
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def report_of(
    label: str, spec: ModelSpec, layers: list[LayerActivations], tokens: int
) -> ActivationReport:
    """Return the report on measured layers."""
    return ActivationReport(
        label=label,
        activation=spec.traits.activation,
        gated=spec.traits.ffn == "glu",
        tokens=tokens,
        layers=tuple(layers),
    )


def measure_layer(layer: FfnLayer) -> LayerActivations:
    """Return the means over the tokens a network receives."""
    import torch

    norms = layer.weights.neuron_norms()
    rows = torch.cat([_token_rows(layer.weights.hidden(x), norms) for x in layer.chunks()])
    mean = rows.double().mean(dim=0).tolist()
    below, neurons = 1 + len(FRACTIONS), 2 + len(FRACTIONS) + len(MASSES)
    return LayerActivations(
        layer=layer.index,
        zeros=mean[0],
        below=tuple(mean[1:below]),
        hoyer=mean[below],
        neurons=tuple(mean[below + 1 : neurons]),
        half=mean[neurons],
        half_in_groups=mean[neurons + 1],
    )


def _token_rows(hidden: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return what is measured of each token, in the order of `LayerActivations`, [T, 10].

    Args:
        hidden: what the down projection receives, [T, I].
        norms: length of each neuron's output weights, [I].
    """
    import torch

    count = hidden.shape[1]
    size = hidden.abs()
    largest = size.amax(dim=1, keepdim=True)
    mass = (size * norms).square()
    total = mass.sum(dim=1, keepdim=True).clamp_min(1e-38)
    ranked = mass.sort(dim=1, descending=True).values.cumsum(dim=1) / total
    columns = [(hidden == 0).float().mean(dim=1)]
    columns += [(size < largest / n).float().mean(dim=1) for n in FRACTIONS]
    squares = size.square().sum(dim=1).clamp_min(1e-38)
    columns.append(size.sum(dim=1).square() / squares / count)
    # neurons before the mass is reached, and the one that reaches it
    columns += [((ranked < m).sum(dim=1) + 1).clamp_max(count) / count for m in MASSES]
    columns.append(ranked[:, max(count // 2, 1) - 1])
    columns.append(_half_in_groups(mass) / total[:, 0])
    return torch.stack(columns, dim=1)


def _half_in_groups(mass: torch.Tensor) -> torch.Tensor:
    """Return the mass of each token's best half of the runs of GROUP neurons, [T, I] -> [T]."""
    groups = max(mass.shape[1] // GROUP, 1)
    width = mass.shape[1] // groups
    summed = mass[:, : groups * width].reshape(len(mass), groups, width).sum(dim=2)
    return summed.topk(max(groups // 2, 1), dim=1).values.sum(dim=1)
