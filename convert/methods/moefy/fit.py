"""The arrays of a split: the order of each layer's neurons, routers, thresholds.

Orders are found before anything is written, layer by layer, and kept (4 bytes a neuron); routers
are computed when they are written, from the order and the same rows, so memory does not grow with
the number of layers. Shapes: f neurons, d hidden size, N experts of m neurons, s shared neurons,
T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaconvert.arch.adaptive import router_tensors
from adaconvert.arch.sites import ffn_site
from adaconvert.data.text import Documents
from adaconvert.errors import OptionError, SourceError
from adaconvert.methods.moefy.config import DATA_SPLITS, MoefyConfig, Sizes
from adaconvert.methods.moefy.plan import order_key, router_key, whole
from adaconvert.methods.sources import Described
from adaconvert.planning.evaluate import evaluate
from adaconvert.planning.seeds import seed_for
from adaconvert.progress import bar

if TYPE_CHECKING:
    import numpy

    from adaconvert.layerwise.ffn_data import FfnLayer

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

#: tokens of one block of calibration text.
LENGTH = 512


def weight_rows(item: Described, layer: int, matrix: str) -> Array:
    """Return the rows of "gate" or "up" of one block, float32 [f, d]; a plain FFN has "up" alone.

    Raises:
        SourceError: a weight is not finite.
    """
    import numpy

    site = ffn_site(item.spec, layer)
    roles = {part.role: part for part in site.parts}
    part = roles.get(matrix) or roles["gate_up"]
    ref = item.source.tensors[part.tensor]
    rows = evaluate(whole(ref), [item.source], {})
    rows = rows.T if part.axis == 1 else rows
    if part.runs == 2:
        half = len(rows) // 2
        rows = rows[:half] if matrix == "gate" else rows[half:]
    if not numpy.isfinite(rows).all():
        raise SourceError(
            "holds NaN or infinity, so its neurons cannot be compared",
            where=f"{ref.file}: tensor '{part.tensor}'",
        )
    return numpy.ascontiguousarray(rows, dtype=numpy.float32)


def first_matrix(item: Described) -> str:
    """Return the matrix the activation follows: "gate", of a plain FFN "up"."""
    return "gate" if item.spec.traits.ffn == "glu" else "up"


@dataclass(slots=True, kw_only=True)
class Fits(Mapping[str, "Array"]):
    """The fitted arrays of a run by key; see the module's text on when each is computed.

    Attributes:
        orders: by block, int64 [f]; empty for splits that keep the order.
        representatives: by block, the neuron that stands for each expert, where the split says so.
        thresholds: by block, where they were to be found.
    """

    item: Described
    config: MoefyConfig
    sizes: Sizes
    layers: tuple[int, ...]
    orders: dict[int, Array] = field(default_factory=dict)
    representatives: dict[int, Array] = field(default_factory=dict)
    thresholds: dict[int, float] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Array:
        kind, _, rest = key.partition(".")
        layer, _, name = rest.partition(".")
        if kind == "order":
            return self.orders[int(layer)]
        return self._router(int(layer))[name]

    def __iter__(self) -> Iterator[str]:
        for layer in self.layers:
            if layer in self.orders:
                yield order_key(layer)
            for name in self._router_names():
                yield router_key(layer, name)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _router_names(self) -> list[str]:
        shapes = router_tensors(
            {"kind": self.config.router},
            hidden=self.item.spec.hidden,
            experts=self.sizes.experts,
            gated=self.item.spec.traits.ffn == "glu",
        )
        return list(shapes)

    def order(self, layer: int) -> Array:
        """Return the order of a block's neurons, the identity where the split keeps it."""
        import numpy

        return self.orders.get(layer, numpy.arange(self.item.spec.intermediate))

    def _router(self, layer: int) -> dict[str, Array]:
        """Return the router's tensors of one block by name."""
        from adaconvert.clustering import routers

        sizes = self.sizes
        order = self.order(layer)
        first = weight_rows(self.item, layer, first_matrix(self.item))
        kind = self.config.router
        if kind == "param-center":
            return routers.param_center(first, order, sizes.experts, sizes.shared)
        if kind == "similarity":
            return routers.similarity(first, order, sizes.experts, sizes.shared)
        if kind != "analytic":
            return {}
        gated = first_matrix(self.item) == "gate"
        up = weight_rows(self.item, layer, "up") if gated else first
        return routers.analytic(
            first if gated else None,
            up,
            order,
            sizes.experts,
            sizes.shared,
            representatives=self.representatives.get(layer),
        )


def permutes(config: MoefyConfig, sizes: Sizes) -> bool:
    """Return whether the split puts neurons in another order: experts of one neuron need none."""
    if config.split == "contiguous":
        return False
    return sizes.width > 1 or sizes.shared > 0


def fit(
    item: Described,
    config: MoefyConfig,
    sizes: Sizes,
    layers: Sequence[int],
    documents: Documents | None,
    *,
    progress: bool = False,
) -> Fits:
    """Return the arrays of a run.

    Args:
        item: the dense source.
        config, sizes: the options.
        layers: blocks to split.
        documents: text for splits and thresholds that need it, else None.
        progress: show a bar on a terminal.

    Raises:
        SourceError: weights or hidden states are not finite.
        DataError: the text does not fit the model.
        OptionError: the model is no decoder, and the options need it to be run on text.
    """
    fits = Fits(item=item, config=config, sizes=sizes, layers=tuple(layers))
    if documents is None:
        if permutes(config, sizes):
            for layer in bar_over(layers, progress):
                fits.orders[layer] = _order(fits, layer)
        return fits
    for found in _activity(fits, documents, progress):
        _fit_on(fits, found)
    return fits


def bar_over(layers: Sequence[int], progress: bool) -> Iterator[int]:
    """Yield the blocks, with a bar on a terminal."""
    with bar(len(layers), "splitting", "layers", enabled=progress) as shown:
        for layer in layers:
            yield layer
            shown.update(1)


def _order(fits: Fits, layer: int) -> Array:
    """Return the order of one block of a split that looks at weights alone."""
    from adaconvert.clustering import splits

    config, experts = fits.config, fits.sizes.experts
    seed = seed_for(config.seed, f"layer.{layer}.split")
    if config.split == "random":
        return splits.random_order(fits.item.spec.intermediate, seed)
    return splits.clustered_order(_features(fits, layer), experts, seed)


def _features(fits: Fits, layer: int) -> Array:
    """Return what balanced-kmeans compares, [f, d] or [f, 2d]; see `matrices`."""
    import numpy

    asked = fits.config.matrices
    names = [first_matrix(fits.item)] if asked == "auto" else asked.split("+")
    rows = [weight_rows(fits.item, layer, name) for name in names]
    if len(rows) == 1:
        return rows[0]
    lengths = [numpy.linalg.norm(matrix, axis=1, keepdims=True) for matrix in rows]
    unit = [m / numpy.maximum(n, 1e-30) for m, n in zip(rows, lengths, strict=True)]
    return numpy.concatenate(unit, axis=1)


def _activity(fits: Fits, documents: Documents, progress: bool) -> Iterator[FfnLayer]:
    from adaconvert.data.tokens import token_blocks
    from adaconvert.layerwise.ffn_data import ffn_layers

    source = fits.item.source
    tokens = token_blocks(
        documents,
        source.root,
        length=LENGTH,
        max_tokens=fits.config.data_tokens,
        seed=fits.config.seed,
    )
    yield from ffn_layers(source, tokens, layers=fits.layers, progress=progress)


def _fit_on(fits: Fits, layer: FfnLayer) -> None:
    """Fit one block on what its network receives."""
    from adaconvert.methods.moefy import activity

    config, index = fits.config, layer.index
    if config.split in DATA_SPLITS:
        seed = seed_for(config.seed, f"layer.{index}.split")
        found = activity.split(layer, config.split, fits.sizes, seed)
        fits.orders[index] = found.order
        if found.representatives is not None:
            fits.representatives[index] = found.representatives
    elif permutes(config, fits.sizes):
        fits.orders[index] = _order(fits, index)
    if config.keep is not None and config.finds_thresholds:
        fits.thresholds[index] = activity.threshold(
            layer, config.router, fits.order(index), fits.sizes, fits._router(index), config.keep
        )


def check_matrices(item: Described, config: MoefyConfig) -> None:
    """Hold the matrices that are asked for to those the model has.

    Raises:
        OptionError: a gate is asked for and there is none.
    """
    if "gate" in config.matrices and item.spec.traits.ffn != "glu":
        raise OptionError(
            f"a {item.spec.model_type} has no gate",
            where="--matrices",
            expected="auto or up",
            found=config.matrices,
        )
