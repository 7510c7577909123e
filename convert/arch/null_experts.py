"""Null experts as data: what a block's slot in config.json says of them, and their tensors.

A null expert costs nothing: a token that chooses it runs one real expert less. The block keeps
every stock tensor under its name; the null ones lie beside them in a module `null_experts`.
Letters: n real experts of m neurons, M null ones, k experts per token of the source, K' slots, d
hidden size. Sources: AdaMoE 2406.13233; MoE++ 2410.07348 (kinds).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.mixture import Mixture, mixtures
from adaconvert.arch.values import WHERE
from adaconvert.errors import SourceError
from adaconvert.io.names import escape

MODULE = "null_experts"
KINDS = ("zero", "identity", "constant")
WEIGHTS = ("real", "selected")
#: roles of their tensors by name; those after the first are F32 whatever the dtype of the model.
ROLES: Mapping[str, str] = {
    "weight": "router_null",
    "bias": "null_bias",
    "scale": "null_scale",
    "value": "null_value",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NullExperts:
    """The null experts of one block; "null" and "select" of its "ffn" slot.

    Attributes:
        count, slots: M and K'.
        kind: what a chosen null expert adds: nothing ("zero"), its probability times a learned
            scale of the input ("identity") or of a learned vector ("constant").
        weights: "real": the weights of the real experts that run are those of the source's rule
            among them; "selected": the chosen null experts take part in the sum.
        gain: factor on the weights, for "selected".
        min_real: real experts a token runs in any case.
        target: share of the source's k real experts that is meant to run; None for none.
        start: real experts every token runs as it was made; None once biases were fitted on text
            or anything was trained.
        select: which experts run; the rule "null" with the stored bias.
    """

    count: int
    slots: int
    kind: str = "zero"
    weights: str = "real"
    gain: float = 1.0
    min_real: int = 0
    target: float | None = None
    start: int | None = None
    select: Mapping[str, object] = field(default_factory=lambda: {"rule": "null"})

    def content(self) -> dict[str, object]:
        """Return what config.json holds under "null"."""
        start = {} if self.start is None else {"start": self.start}
        return {
            "count": self.count,
            "slots": self.slots,
            "kind": self.kind,
            "weights": self.weights,
            "gain": self.gain,
            "min_real": self.min_real,
            "target": self.target,
            **start,
        }

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return shape of each tensor by its name in the module."""
        found: dict[str, tuple[int, ...]] = {"weight": (self.count, hidden), "bias": (1,)}
        if self.kind == "identity":
            found["scale"] = (1,)
        if self.kind == "constant":
            found["value"] = (self.count, hidden)
        return found

    def reach(self, mixture: Mixture) -> tuple[float, float]:
        """Return the least and the largest share of k real experts a bias can give."""
        least = max(self.min_real, self.slots - self.count, 0)
        return least / mixture.top_k, min(self.slots, mixture.count) / mixture.top_k

    def at_random(self, mixture: Mixture) -> float:
        """Return the expected share of k at random logits, K'n / ((n + M) k) (2406.13233)."""
        return self.slots * mixture.count / ((mixture.count + self.count) * mixture.top_k)

    def expected(self, mixture: Mixture) -> float:
        """Return the real experts per token that costs are stated at: those of the start while it
        is as made, then what the target says; without one, those of the source."""
        if self.start is not None:
            return float(self.start)
        if self.target is not None:
            return self.target * mixture.top_k
        return float(min(mixture.top_k, self.slots))

    def counted(self, mixture: Mixture) -> str:
        """Return in words what `expected` is."""
        number = f"{self.expected(mixture):.3g} real experts"
        if self.start is not None:
            wanted = "" if self.target is None else f", not yet at its target of {self.target:g}"
            return f"{number}, what every token runs as made{wanted}"
        if self.target is not None:
            return f"{number}, its target of {self.target:g}, if its biases hold it"
        return f"{number}, those of the source: what it runs now is not known without running it"


def slot(spec: ModelSpec, mixture: Mixture, nulls: NullExperts) -> dict[str, object]:
    """Return the "ffn" slot of a block with null experts, as config.json holds it."""
    return {
        "mixture": {
            "router": mixture.router,
            "experts": mixture.experts,
            "top_k": mixture.top_k,
            "combine": mixture.combine,
            "scaling": mixture.scaling,
            "float32": mixture.float32,
            "glu": mixture.glu,
        },
        "weights": {},
        "activation": spec.traits.activation,
        "hidden": spec.hidden,
        "intermediate": mixture.count * mixture.width,
        "partition": {"split": "mixture", "permuted": False},
        "experts": {"count": mixture.count, "width": mixture.width},
        "shared": 0,
        "router": {"kind": "mixture"},
        "select": dict(nulls.select),
        "combine": "unit",
        "null": nulls.content(),
    }


def tensors(spec: ModelSpec, mixture: Mixture, nulls: NullExperts) -> Iterator[TensorSpec]:
    """Yield the tensors a block with null experts has beside the stock ones."""
    for name, shape in nulls.shapes(spec.hidden).items():
        yield TensorSpec(
            name=f"{mixture.stored}.{MODULE}.{name}",
            role=ROLES[name],
            shape=shape,
            layer=mixture.layer,
        )


def is_nulled(slots: object) -> bool:
    """Return whether the slots of a site are those of a mixture with null experts."""
    ffn = slots.get("ffn") if isinstance(slots, dict) else None
    return isinstance(ffn, dict) and isinstance(ffn.get("mixture"), dict)


def holds_nulls(adaptive: object) -> bool:
    """Return whether any site of `config.adaptive` is a mixture with null experts."""
    sites = adaptive.get("sites") if isinstance(adaptive, Mapping) else None
    return any(is_nulled(slots) for slots in (sites if isinstance(sites, dict) else {}).values())


def nulled(
    spec: ModelSpec, adaptive: Mapping[str, object]
) -> Iterator[tuple[Mixture, NullExperts]]:
    """Yield the blocks with null experts of an adaptive checkpoint, in order.

    Args:
        spec: the stock model underneath.
        adaptive: `config.adaptive`.

    Raises:
        SourceError: one is malformed, or lies where the model has no sparse block.
    """
    sites = adaptive.get("sites")
    found = {p: s for p, s in (sites if isinstance(sites, dict) else {}).items() if is_nulled(s)}
    if not found:
        return
    known = {mixture.path: mixture for mixture in mixtures(spec)}
    for path in found:
        if path not in known:
            raise SourceError(
                f"adaptive.sites names {escape(path, 80)!r}, where a {spec.architecture} has no "
                "sparse block",
                where=WHERE,
            )
    for path, mixture in known.items():
        if path in found:
            yield mixture, _read(spec, mixture, found[path]["ffn"])


def _read(spec: ModelSpec, mixture: Mixture, ffn: dict[str, Any]) -> NullExperts:
    where = f"adaptive.sites[{escape(mixture.path, 80)}].ffn"
    try:
        held = ffn["null"]
        found = NullExperts(
            count=_whole(held["count"], 1),
            slots=_whole(held["slots"], 1),
            kind=_word(held["kind"], KINDS),
            weights=_word(held["weights"], WEIGHTS),
            gain=_number(held["gain"]),
            min_real=_whole(held["min_real"], 0),
            target=None if held["target"] is None else _number(held["target"]),
            start=None if held.get("start") is None else _whole(held["start"], 0),
            select=dict(ffn["select"]),
        )
    except (KeyError, TypeError, ValueError):
        expected = "count, slots, kind, weights, gain, min_real and target"
        raise SourceError("is not usable", where=f"{where}.null", expected=expected) from None
    stated = slot(spec, mixture, found)
    for key in ("mixture", "experts", "hidden", "intermediate"):
        if ffn.get(key) != stated[key]:
            raise SourceError(
                "is not what the model has there",
                where=f"{where}.{key}",
                expected=str(stated[key]),
                found=escape(str(ffn.get(key)), 200),
            )
    return found


def _whole(value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise ValueError(value)
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _word(value: object, words: tuple[str, ...]) -> str:
    if value not in words:
        raise ValueError(value)
    return str(value)
