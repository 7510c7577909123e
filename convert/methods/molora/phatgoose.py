"""PHATGOOSE: a gate per adapter and linear, trained briefly, becomes what routes to the adapter.

Source: Muqeeth et al. 2024, arXiv 2402.05859, section 3: with everything else frozen, v is trained
in y = W x + sigmoid(v . x) s B A x on the text the adapter was trained on (equation 3); then the
score of a token is LN(x) . LN(v) / sqrt(n), and the softmax is over the two largest. Optimiser and
rate are those of the official code (`colm/experiments/train.gin`): AdamW, 5e-3 after a warm-up of 6
percent, 100 steps. Its batch is 1024 examples; ours is `batch_tokens`.
Shapes: n inputs of a linear, E adapters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import TYPE_CHECKING, Any

from adaconvert.arch.adapters import linears, shapes_of, sites_of
from adaconvert.data.text import Documents
from adaconvert.errors import OptionError, ResourceError, SourceError
from adaconvert.io.available import available_memory
from adaconvert.io.names import escape
from adaconvert.layerwise.work import WorkFolder
from adaconvert.methods.beside import config_beside
from adaconvert.methods.d2dmoe.fit import device_of
from adaconvert.methods.molora.compose import Composed
from adaconvert.methods.molora.gate_training import GateSettings, Kept, Training
from adaconvert.methods.sources import Described
from adaconvert.progress import bar
from adaconvert.units import human_bytes

if TYPE_CHECKING:
    import numpy
    import torch

    from adaconvert.data.tokens import TokenBlocks

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

#: adapters per token, of the paper.
K = 2
#: of torch's layer norm, which standardises the input.
_EPSILON = 1e-5
#: of the memory that is free, what the model may take.
_SHARE = 0.6


def router() -> dict[str, object]:
    """Return what an adapter_config.json says of PHATGOOSE's routers; 1 / sqrt(n), which differs
    from linear to linear, is in the rows."""
    return {"kind": "linear", "reads": "module", "score": "dot", "norm": "layernorm", "scale": 1.0}


def select(experts: int, k: int | None = None) -> dict[str, object]:
    """Return the rule of the gates: the softmax over the k chosen, 2 or all there are."""
    return {"rule": "top-k", "k": min(k or K, experts), "renormalize": True}


def router_rows(gates: Array) -> Array:
    """Return the rows of a router, LN(v) / sqrt(n), float32 [E, n]; zeros of a gate that is zero.

    Args:
        gates: v of each adapter, [E, n].
    """
    import numpy

    wide = gates.astype(numpy.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    power = (centred**2).mean(axis=1, keepdims=True)
    rows = centred / numpy.sqrt(power + _EPSILON) / math.sqrt(gates.shape[1])
    found: Array = rows.astype(numpy.float32)
    return found


def phatgoose(
    composed: Composed,
    item: Described,
    documents: Sequence[Documents],
    settings: GateSettings,
    *,
    work: WorkFolder | None = None,
    progress: bool = False,
) -> dict[str, Array]:
    """Return the gates of all adapters by path, v float32 [E, n]; zeros where one has no factors.

    The same adapters, text, settings and number of threads give the same bytes, also after a run
    that was interrupted.

    Args:
        composed: the adapters.
        item: the model they are for.
        documents: a text for each.
        settings: how to train.
        work: where finished steps are kept; a run with the same one goes on.
        progress: show a bar on a terminal.

    Raises:
        OptionError: the model is no language model, has routed adapters already, or there is no
            such device.
        DataError: the text does not fit the model, or is shorter than two tokens.
        SourceError: a loss is not finite.
        ResourceError: memory cannot hold the model.
    """
    import numpy

    _check(composed, item, documents)
    texts = [_blocks(item, one, settings) for one in documents]
    device = device_of(settings.device)
    model = _model(composed, item).to(device)
    found = []
    total = settings.steps * len(texts)
    with bar(total, "gates", "steps", enabled=progress) as shown:
        for index, blocks in enumerate(texts):
            _place(model, composed, index)
            kept = None if work is None else Kept(work, f"gate.{index}")
            run = Training(model, blocks, settings, index, composed.adapters[index].name)
            found.append(run.trained(shown, kept))
    return {path: numpy.stack([gates[path] for gates in found]) for path in composed.paths}


def run_digest(
    composed: Composed, item: Described, documents: Sequence[Documents], settings: GateSettings
) -> str:
    """Return the sha256 of everything gates depend on, for a work folder; the device left out."""
    facts = [
        composed.digest(),
        item.source.fingerprint,
        [one.digest for one in documents],
        astuple(replace(settings, device="")),
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _check(composed: Composed, item: Described, documents: Sequence[Documents]) -> None:
    """Return only when gates can be trained at all."""
    if item.spec.kind != "decoder":
        raise OptionError(
            "trains gates on the loss of a language model",
            where="--routing phatgoose",
            found=f"model_type {escape(item.spec.model_type)}",
            hint="Choose --routing arrow, which needs no data.",
        )
    sites: Any = (item.spec.adaptive or {}).get("sites", {})
    if any("adapters" in (slots.get("linear") or {}) for slots in sites.values()):
        raise OptionError("the source has routed adapters already", where=item.source.label)
    if len(documents) != len(composed.adapters):
        raise OptionError(
            "one text for each adapter",
            where="--data",
            expected=len(composed.adapters),
            found=len(documents),
        )


def _blocks(item: Described, documents: Documents, settings: GateSettings) -> TokenBlocks:
    """Return as many sequences as the steps take, no more than there are."""
    from adaconvert.data.tokens import token_blocks

    return token_blocks(
        documents,
        item.source.root,
        length=settings.length,
        max_tokens=max(settings.steps * settings.batch_tokens, 2),
        seed=settings.seed,
        spread=True,
    )


def _model(composed: Composed, item: Described) -> Any:
    """Return the model in float32 with one adapter a linear behind a sigmoid; only gates train.

    Raises:
        ResourceError: memory cannot hold it.
        SourceError: transformers finds tensors missing.
    """
    from adaconvert.layerwise.build import load
    from adaconvert.layerwise.configs import load_config
    from adaconvert.layerwise.stored import ReadCount, stored_tensors
    from adaconvert.modeling.loading import model_class

    _check_memory(item)
    sites = _sites(composed, item)
    config = config_beside(item, sites)
    tensors: dict[str, object] = dict(stored_tensors(item.source, ReadCount()))
    tensors |= _zeros(item, sites)
    loaded = load_config(replace(item.source, config=config))
    model, report = load(model_class(config), loaded, tensors)
    if report.missing or report.mismatched:
        lacks = (*report.missing, *report.mismatched)[0]
        raise SourceError(f"transformers finds no '{escape(lacks)}'", where=item.source.label)
    for site in _adapted(model).values():
        site.router.weight.requires_grad_()
    return model


def _adapted(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.adaptive_adapters()
    return found


def _check_memory(item: Described) -> None:
    need = 4 * sum(math.prod(ref.shape) for ref in item.source.tensors.values())
    free = int(available_memory() * _SHARE)
    if need > free:
        raise ResourceError(
            "the model has to be loaded in float32 to train gates",
            where="--routing phatgoose",
            expected=f"{human_bytes(need)} of memory",
            found=human_bytes(free),
            hint="Choose --routing arrow, which reads the adapters alone.",
        )


def _sites(composed: Composed, item: Described) -> dict[str, dict[str, Any]]:
    one = {
        "num_experts": 1,
        "r": composed.rank,
        "scaling": 1.0,
        "router": {**router(), "norm": "none"},
        "select": {"rule": "sigmoid"},
    }
    return sites_of(one, composed.sizes, hidden=item.spec.hidden)


def _zeros(item: Described, sites: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the adapters and gates before one is in place, by their names on disk."""
    import torch

    known = linears(item.spec)
    return {
        f"{known[path].stored}.{name}": torch.zeros(shape)
        for path, slots in sites.items()
        for name, shape in shapes_of(path, slots["linear"]).items()
    }


def _place(model: Any, composed: Composed, index: int) -> None:
    """The model holds adapter `index`, and gates of zero."""
    import torch

    with torch.no_grad():
        for path, site in _adapted(model).items():
            a, b = composed.stack(path)
            b = b[index] * b.dtype.type(composed.scaling[index])
            site.adapters.a.copy_(torch.from_numpy(a[index])[None])
            site.adapters.b.copy_(torch.from_numpy(b)[None])
            site.router.weight.zero_()
