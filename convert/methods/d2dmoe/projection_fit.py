"""The arrays of stage 5, fitted layer by layer on what each projection receives.

Shapes: d inputs, o outputs, f neurons, E experts, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.data.text import Documents
from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.layerwise.ffn_weights import ExpertNorms, FfnWeights
from adaconvert.layerwise.projection_data import ProjectionLayer, projection_layers
from adaconvert.layerwise.states import run_digest
from adaconvert.layerwise.work import WorkFolder
from adaconvert.methods.d2dmoe.config import D2dmoeConfig
from adaconvert.methods.d2dmoe.distil import (
    Distilled,
    DistilQuality,
    DistilSettings,
    NetworkQuality,
    distil,
)
from adaconvert.methods.d2dmoe.fit import check_enough, device_of, tokens_of
from adaconvert.methods.d2dmoe.projections import Edit
from adaconvert.methods.d2dmoe.quality import RouterQuality
from adaconvert.methods.d2dmoe.router import RouterSettings, fit_router
from adaconvert.methods.sources import Described
from adaconvert.planning.seeds import seed_for
from adaconvert.progress import bar

if TYPE_CHECKING:
    import numpy
    import torch

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

_log = logging.getLogger(__name__)

#: folder inside the work folder.
FOLDER = "projections"
_QUALITY = "quality"


def fit_networks(
    item: Described,
    config: D2dmoeConfig,
    changes: Sequence[Edit],
    documents: Documents,
    *,
    progress: bool = False,
) -> tuple[dict[str, Array], dict[str, NetworkQuality]]:
    """Return the fitted arrays by key, and by path how good each network is.

    Args:
        item: the source.
        config: the options.
        changes: to its projections.
        documents: text to fit on.
        progress: show a bar on a terminal.

    Raises:
        SourceError: weights or hidden states are not finite.
        DataError: the text does not fit the model, or is too short.
        OptionError: the model cannot be run on text, or the work folder is another run's.
        ResourceError: the hidden states do not fit into memory and there is no work folder.
    """
    todo = [change for change in changes if change.fitted()]
    kept = _Kept(item, config, todo, documents)
    steps = sum(_steps(config, change) for change in todo)
    with bar(steps, "projections", "steps", enabled=progress) as shown:
        for layer in kept.layers():
            for change in todo:
                if change.site.layer == layer.index:
                    arrays, quality = _fit_one(config, layer, change, shown.update)
                    _log.info("%s: %s", change.site.path, quality.line())
                    kept.add(change, arrays, quality)
            kept.finish(layer.index)
    return kept.collected()


def _steps(config: D2dmoeConfig, change: Edit) -> int:
    return config.projection_steps * change.is_new + config.router_steps * change.fits_router


class _Kept:
    """What is fitted so far, in memory or in a work folder from which a killed run goes on."""

    def __init__(
        self,
        item: Described,
        config: D2dmoeConfig,
        todo: Sequence[Edit],
        documents: Documents,
    ) -> None:
        self._source, self._device = item.source, device_of(config.device)
        self._todo = todo
        self._tokens = tokens_of(item, config, documents)
        check_enough(self._tokens.tokens)
        self._found: dict[int, dict[str, Array]] = {}
        self._work: WorkFolder | None = None
        if config.work is not None:
            # tau changes nothing that is fitted, so a finished run serves another one
            facts = [replace(config, work=None, tau=None)]
            bare = [
                (change.site.path, replace(change.network, select={}), change.is_new)
                for change in todo
            ]
            digest = run_digest(item.source, self._tokens, facts, bare)
            folder = Path(config.work)
            folder.mkdir(parents=True, exist_ok=True)
            self._work = WorkFolder(folder / FOLDER, digest)

    def layers(self) -> Iterator[ProjectionLayer]:
        """Yield the blocks that are still to be fitted."""
        return projection_layers(
            self._source,
            self._tokens,
            roles=sorted({change.site.role for change in self._todo}),
            layers={change.site.layer for change in self._todo},
            work=self._work,
            device=self._device,
        )

    def add(self, change: Edit, arrays: Mapping[str, Array], quality: NetworkQuality) -> None:
        """One network of a block is fitted."""
        import numpy

        found = self._found.setdefault(change.site.layer, {})
        found |= {change.key(name): array for name, array in arrays.items()}
        found[change.key(_QUALITY)] = numpy.array(quality.dump())

    def finish(self, layer: int) -> None:
        """A block is fitted; with a work folder it is on disk."""
        if self._work is not None and layer in self._found:
            self._work.save(f"layer.{layer}", self._found.pop(layer))

    def collected(self) -> tuple[dict[str, Array], dict[str, NetworkQuality]]:
        """Return everything; the work folder holds no hidden states any more."""
        arrays: dict[str, Array] = {}
        for layer in sorted({change.site.layer for change in self._todo}):
            arrays |= self._work.load(f"layer.{layer}") if self._work else self._found[layer]
        if self._work is not None:
            self._work.discard_states()
        quality = {
            change.site.path: NetworkQuality.load(str(arrays.pop(change.key(_QUALITY))))
            for change in self._todo
        }
        return arrays, quality


def _fit_one(
    config: D2dmoeConfig,
    layer: ProjectionLayer,
    change: Edit,
    step_done: Callable[[], object],
) -> tuple[dict[str, Array], NetworkQuality]:
    """Return a projection's arrays by their names after the site's, and how good they are."""
    role, path = change.site.role, f"projection.{change.site.layer}.{change.site.role}"
    inputs = layer.inputs[role]
    arrays: dict[str, Array] = {}
    distilled = None
    if change.is_new:
        settings = _settings(config, change, seed_for(config.seed, path))
        made = distil(inputs, layer.matrices[role], settings, step_done=step_done)
        distilled = made.quality
        weights = _split(made, change, seed_for(config.seed, f"{path}.split"))
        arrays |= _named(weights)
    else:
        weights = layer.networks[role]
    router = None
    if change.fits_router:
        found, router = _fit_router(config, inputs, weights, change, step_done)
        arrays |= found
    _check_finite(arrays, change)
    return arrays, NetworkQuality(distilled=distilled, router=router)


def _settings(config: D2dmoeConfig, change: Edit, seed: int) -> DistilSettings:
    return DistilSettings(
        neurons=change.network.neurons,
        up_bias=change.network.up_bias,
        down_bias=change.network.down_bias,
        steps=config.projection_steps,
        batch_tokens=config.projection_batch,
        learning_rate=config.projection_lr,
        sparsity=config.projection_sparsity,
        seed=seed,
    )


def _split(made: Distilled, change: Edit, seed: int) -> FfnWeights:
    """Return the network with its neurons in the order of its experts: like rows together, as the
    feed-forward networks are split."""
    import torch

    from adaconvert.clustering import splits

    network = change.network
    order = torch.arange(network.neurons)
    if network.experts > 1 and network.width > 1:
        rows = made.up.cpu().numpy()
        order = torch.from_numpy(splits.clustered_order(rows, network.experts, seed))
    order = order.to(made.up.device)
    return FfnWeights(
        gate=None,
        up=made.up[order],
        down=made.down[:, order],
        gate_bias=None,
        up_bias=None if made.up_bias is None else made.up_bias[order],
        down_bias=made.down_bias,
        activation=torch.relu,
    )


def _named(weights: FfnWeights) -> dict[str, Array]:
    named: dict[str, torch.Tensor | None] = {
        "up.weight": weights.up,
        "down.weight": weights.down,
        "up.bias": weights.up_bias,
        "down.bias": weights.down_bias,
    }
    return {
        name: tensor.cpu().contiguous().numpy()
        for name, tensor in named.items()
        if tensor is not None
    }


def _fit_router(
    config: D2dmoeConfig,
    inputs: torch.Tensor,
    weights: FfnWeights,
    change: Edit,
    step_done: Callable[[], object],
) -> tuple[dict[str, Array], RouterQuality]:
    import numpy

    network = change.network
    norms = ExpertNorms.of(weights, numpy.arange(network.neurons), width=network.width)
    width = network.router["width"]
    assert isinstance(width, int)
    settings = RouterSettings(
        width=width,
        steps=config.router_steps,
        batch_tokens=config.router_batch,
        learning_rate=config.router_lr,
        loss=config.router_loss,
        seed=seed_for(config.seed, f"projection.{change.site.layer}.{network.role}.router"),
    )
    fitted = fit_router(inputs, lambda x: norms(weights.hidden(x)), settings, step_done=step_done)
    found = {"router.w1": fitted.w1.cpu().numpy(), "router.w2": fitted.w2.cpu().numpy()}
    return found, fitted.quality


def _check_finite(arrays: Mapping[str, Array], change: Edit) -> None:
    import numpy

    for name, array in arrays.items():
        if not numpy.isfinite(array).all():
            option = "--router-lr" if name.startswith("router.") else "--projection-lr"
            raise SourceError(
                f"{escape(change.site.path)}.{name} did not converge to finite weights",
                where="calibration data",
                hint=f"Lower {option}.",
            )


def network_lines(found: Mapping[str, NetworkQuality], changes: Sequence[Edit]) -> list[str]:
    """Return how good the networks are, a sentence for each kind of projection, and one for their
    routers."""
    lines = []
    for role in dict.fromkeys(change.site.role for change in changes):
        ranked = sorted(
            (quality.distilled.error, change.site.layer, quality.distilled)
            for change in changes
            if change.site.role == role
            and (quality := found.get(change.site.path)) is not None
            and quality.distilled is not None
        )
        if ranked:
            lines.append(_error_line(role, [(quality, layer) for _, layer, quality in ranked]))
    routers = [quality.router for quality in found.values() if quality.router is not None]
    if routers:
        mean = sum(router.spearman for router in routers) / len(routers)
        captured = sum(router.captured["E/2"] for router in routers) / len(routers)
        constant = sum(router.constant["E/2"] for router in routers) / len(routers)
        lines.append(
            f"routers of projections: rank correlation with the true contributions {mean:.2f} on "
            f"average; choosing half of the experts by them keeps {captured:.1%} of what the best "
            f"half has, the same half for every token {constant:.1%}"
        )
    return lines


def _error_line(role: str, ranked: Sequence[tuple[DistilQuality, int]]) -> str:
    """Return one kind's errors in words, of networks from the best to the worst."""
    (best, first), (worst, last) = ranked[0], ranked[-1]
    count = len(ranked)
    mean = sum(quality.error for quality, _ in ranked) / count
    linear = sum(quality.linear for quality, _ in ranked) / count
    zeros = sum(quality.zeros for quality, _ in ranked) / count
    span = f" in block {first}"
    if count > 1:
        span = (
            f" on average, {best.error:.3f} in block {first} to {worst.error:.3f} in block {last}"
        )
    return (
        f"networks in place of {role}, {best.tokens} held-out tokens: squared error {mean:.3f} of "
        f"the variance{span} (the best linear map of their size: {linear:.3f}); {zeros:.0%} of "
        "their hidden units are zero"
    )
