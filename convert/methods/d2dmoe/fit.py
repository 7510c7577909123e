"""The arrays of a `d2dmoe` run, fitted layer by layer on what each network receives.

Shapes: f neurons, d hidden size, N experts, W router width, T tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.data.images import Images, image_blocks
from adaconvert.data.text import Documents
from adaconvert.errors import DataError, OptionError, SourceError
from adaconvert.io.names import escape
from adaconvert.layerwise.ffn_data import FfnLayer, ffn_layers, run_digest
from adaconvert.layerwise.ffn_weights import ExpertNorms
from adaconvert.layerwise.work import WorkFolder
from adaconvert.methods.d2dmoe.config import D2dmoeConfig
from adaconvert.methods.d2dmoe.distil import NetworkQuality
from adaconvert.methods.d2dmoe.quality import RouterQuality
from adaconvert.methods.d2dmoe.router import RouterSettings, fit_router
from adaconvert.methods.moefy.config import Sizes
from adaconvert.methods.moefy.fit import first_matrix, weight_rows
from adaconvert.methods.moefy.plan import order_key, router_key
from adaconvert.methods.sources import Described
from adaconvert.planning.seeds import seed_for
from adaconvert.progress import bar

if TYPE_CHECKING:
    import numpy

    from adaconvert.data.tokens import TokenBlocks

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

_log = logging.getLogger(__name__)

#: tokens of one block of text.
LENGTH = 512
#: tokens below which nothing can be fitted: one batch of the default size.
LEAST = 256
_STATES = ("inputs", "hidden")


@dataclass(slots=True, kw_only=True)
class Fits(Mapping[str, "Array"]):
    """The fitted arrays of a run by key, and how good its routers are.

    Attributes:
        arrays: orders int64 [f] and router tensors float32, by the keys of `moefy.plan`.
        quality: by block; empty when no router was fitted.
        networks: by path, how good each network in place of a projection is.
    """

    arrays: dict[str, Array] = field(default_factory=dict)
    quality: dict[int, RouterQuality] = field(default_factory=dict)
    networks: dict[str, NetworkQuality] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Array:
        return self.arrays[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def fit(
    item: Described,
    config: D2dmoeConfig,
    sizes: Mapping[int, Sizes],
    documents: Documents | Images | None,
    *,
    progress: bool = False,
) -> Fits:
    """Return the arrays of a run.

    Args:
        item: the source; one that is split already keeps its order.
        config: the options.
        sizes: of every block to convert.
        documents: text or images to fit routers on; None when none are fitted.
        progress: show a bar on a terminal.

    Raises:
        SourceError: weights or hidden states are not finite.
        DataError: the text does not fit the model, or is too short.
        OptionError: the model cannot be run on text, or the work folder is another run's.
        ResourceError: the hidden states do not fit into memory and there is no work folder.
    """
    fits = Fits()
    splits = item.spec.adaptive is None
    if documents is None:
        with bar(len(sizes), "splitting", "layers", enabled=progress) as shown:
            for layer, size in sizes.items():
                if splits and size.width > 1:
                    fits.arrays[order_key(layer)] = _order(item, config, layer, size)
                shown.update()
        return fits
    run = _Run(item, config, sizes, documents)
    with bar(len(sizes) * config.router_steps, "routers", "steps", enabled=progress) as shown:
        for block in run.layers():
            found = _fit_layer(item, config, block, sizes[block.index], shown.update)
            run.keep(block.index, found)
    run.collect(fits)
    return fits


class _Run:
    """Text cut into tokens, and where finished layers are kept."""

    def __init__(
        self,
        item: Described,
        config: D2dmoeConfig,
        sizes: Mapping[int, Sizes],
        documents: Documents | Images,
    ) -> None:
        self._source, self._device = item.source, device_of(config.device)
        self._tokens = tokens_of(item, config, documents)
        check_enough(self._tokens.tokens)
        self._layers = sorted(sizes)
        self._found: dict[int, dict[str, Array]] = {}
        self._work: WorkFolder | None = None
        if config.work is not None:
            # tau changes nothing that is fitted, so a finished run serves another one
            facts = replace(config, work=None, tau=None)
            digest = run_digest(item.source, self._tokens, facts, sorted(sizes.items()))
            self._work = WorkFolder(Path(config.work), digest)

    def layers(self) -> Iterator[FfnLayer]:
        """Yield the blocks that are still to be fitted."""
        return ffn_layers(
            self._source,
            self._tokens,
            layers=self._layers,
            work=self._work,
            device=self._device,
        )

    def keep(self, layer: int, found: dict[str, Array]) -> None:
        """A block is fitted; with a work folder it is on disk."""
        if self._work is not None:
            self._work.save(f"layer.{layer}", found)
        else:
            self._found[layer] = found

    def collect(self, fits: Fits) -> None:
        """Every block's arrays are in `fits`; the work folder holds no hidden states any more."""
        for layer in self._layers:
            found = self._work.load(f"layer.{layer}") if self._work else self._found[layer]
            fits.quality[layer] = RouterQuality(**json.loads(str(found.pop("quality"))))
            for name, array in found.items():
                key = order_key(layer) if name == "order" else router_key(layer, name)
                fits.arrays[key] = array
        if self._work is not None:
            self._work.discard_states()


def tokens_of(item: Described, config: D2dmoeConfig, documents: Documents | Images) -> TokenBlocks:
    """Return the text cut into blocks of tokens, or images as blocks, as many as the options allow.

    Raises:
        DataError: the text does not fit the model.
    """
    from adaconvert.data.tokens import token_blocks

    if isinstance(documents, Images):
        return image_blocks(documents, max_tokens=config.data_tokens, seed=config.seed)
    return token_blocks(
        documents,
        item.source.root,
        length=min(LENGTH, item.spec.max_positions or LENGTH),
        max_tokens=config.data_tokens,
        seed=config.seed,
    )


def check_enough(tokens: int) -> None:
    """Return only when that many tokens are enough to fit routers on at all.

    Raises:
        DataError: they are not.
    """
    if tokens < LEAST:
        raise DataError(
            "too little text to fit routers on",
            where="--data",
            expected=f"{LEAST} tokens or more, and tens of thousands for good routers",
            found=tokens,
            hint="Give more data, or raise --data-tokens.",
        )


def kept_layers(config: D2dmoeConfig) -> str | None:
    """Return what an interrupted run has kept in its work folder, None for nothing."""
    found = [] if config.work is None else list(Path(config.work).rglob("layer.*.npz"))
    if config.work is None or not found:
        return None
    layers = "1 fitted layer is" if len(found) == 1 else f"{len(found)} fitted layers are"
    name = escape(Path(config.work).name)
    return f"{layers} kept in --work {name}: run the same command to go on from there."


def _fit_layer(
    item: Described,
    config: D2dmoeConfig,
    layer: FfnLayer,
    size: Sizes,
    step_done: Callable[[], object],
) -> dict[str, Array]:
    """Return the order, router and quality of one block."""
    import numpy

    found: dict[str, Array] = {}
    order = numpy.arange(layer.weights.neurons)
    if item.spec.adaptive is None and size.width > 1:
        order = found["order"] = _order(item, config, layer.index, size)
    settings = config.settings(item.spec, seed_for(config.seed, f"layer.{layer.index}.router"))
    w1, w2, quality = fit_layer_router(layer, order, size, settings, step_done=step_done)
    _log.info("layer %d: %s", layer.index, quality.line())
    if not (numpy.isfinite(w1).all() and numpy.isfinite(w2).all()):
        raise SourceError(
            f"the router of block {layer.index} did not converge to finite weights",
            where="calibration data",
            hint="Lower --router-lr.",
        )
    text = numpy.array(json.dumps(quality.to_json()))
    return {**found, "w1": w1, "w2": w2, "quality": text}


def fit_layer_router(
    layer: FfnLayer,
    order: Array,
    size: Sizes,
    settings: RouterSettings,
    *,
    step_done: Callable[[], object] = lambda: None,
) -> tuple[Array, Array, RouterQuality]:
    """Return w1 [W, d], w2 [N, W] and the quality of a contribution router for one block.

    Args:
        layer: the network and what it receives.
        order: of its neurons; experts follow each other in it.
        size: of the experts.
        settings: how to train.
        step_done: called after every step.
    """
    norms = ExpertNorms.of(layer.weights, order, width=size.width, shared=size.shared)
    weights = layer.weights
    fitted = fit_router(
        layer.inputs, lambda x: norms(weights.hidden(x)), settings, step_done=step_done
    )
    return fitted.w1.cpu().numpy(), fitted.w2.cpu().numpy(), fitted.quality


def _order(item: Described, config: D2dmoeConfig, layer: int, size: Sizes) -> Array:
    """Return the order of one block's neurons: the split `moefy` makes of the same options.

    The rows of the gate are compared, of a plain FFN those of its input matrix.

    Source: Szatkowski et al. 2024, arXiv 2310.04361: balanced k-means on normalised rows; the
        official code clusters `Wg` of Gemma because it is the sparse one.
    """
    from adaconvert.clustering import splits

    rows = weight_rows(item, layer, first_matrix(item))
    order: Array = splits.clustered_order(
        rows, size.experts, seed_for(config.seed, f"layer.{layer}.split")
    )
    return order


def device_of(name: str) -> str:
    """Return the torch device a name stands for; "auto" is the accelerator if there is one.

    Raises:
        OptionError: there is no such device.
    """
    import torch

    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return "cpu" if found is None else found.type
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            "cannot be used on this machine", where="--device", found=escape(name, 40)
        ) from error
    return name
