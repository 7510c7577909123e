"""How routers and weights fare: load, dead experts, collapse, numbers that are none.

Shapes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaconvert.errors import TrainingError
from adaconvert.io.names import escape

#: gradient norms above this cannot be trained on: their squares soon leave float32.
EXPLODED = 1e10
#: a block that runs fewer experts a token has too few uses to say which ones it prefers; ours.
RARE = 0.1
#: a share that is farther from its budget is told; ours.
MISSED = 0.05
#: steps whose routing a result is judged by; a fifth of the run where that is less.
LAST_STEPS = 50


def last_steps(steps: int) -> int:
    """Return over how many of a run's last steps its routers are judged."""
    return max(1, min(LAST_STEPS, steps // 5))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerHealth:
    """What one router did over some steps.

    Attributes:
        layer: index of the block.
        counts: how often each expert was chosen, E numbers.
        tokens: tokens it routed.
        entropy: of its probabilities, averaged over tokens, as a fraction of ln E.
        share: experts a token ran over those of the model without null experts; None without them.
        idle: share of the tokens that ran no expert; None without null experts.
        site: the linear whose adapters it weighs; None where it chooses experts.
        even: an uneven load is a fault.
    """

    layer: int
    counts: tuple[int, ...]
    tokens: int
    entropy: float
    share: float | None = None
    idle: float | None = None
    site: str | None = None
    even: bool = True

    @property
    def load(self) -> float:
        """Return the uses of the busiest expert as a multiple of the mean; 1 when even."""
        return max(self.counts) * len(self.counts) / max(sum(self.counts), 1)

    @property
    def is_rare(self) -> bool:
        """Return whether uses are below `RARE` of the tokens, as under a budget near 0."""
        return sum(self.counts) < RARE * self.tokens

    @property
    def dead(self) -> tuple[int, ...]:
        """Return the experts nothing was sent to; none of a block that `is_rare`."""
        if self.is_rare:
            return ()
        return tuple(index for index, count in enumerate(self.counts) if not count)

    @property
    def crowding(self) -> float:
        """Return the share of the choices that the k busiest experts got, k being the experts of a
        token rounded up; 0 where a token runs all of them, which is no crowding, or where the block
        `is_rare`.

        With null experts k is rounded to the nearest, because a mean of 2.01 says nothing of three
        experts, and the share is of the most that k experts can get.
        """
        uses, whole = sum(self.counts), max(self.tokens, 1)
        k = math.ceil(uses / whole) if self.share is None else max(round(uses / whole), 1)
        if self.is_rare or k >= len(self.counts) or not k:
            return 0.0
        most = uses if self.share is None else min(uses, k * whole)
        return sum(sorted(self.counts)[-k:]) / max(most, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            "layer": self.layer,
            "experts": len(self.counts),
            "entropy": round(self.entropy, 4),
            "load": round(self.load, 4),
            "busiest": round(self.crowding, 4),
            "dead": list(self.dead),
            **({} if self.share is None else {"share": round(self.share, 4)}),
            **({} if self.idle is None else {"idle": round(self.idle, 4)}),
            **({} if self.site is None else {"site": self.site}),
        }


def logged(layers: Sequence[LayerHealth]) -> dict[str, Any]:
    """Return what a log entry says of the routers, nothing when no token was routed."""
    if not layers:
        return {}
    # a block may have a router for each of its linears
    blocks: dict[int, list[LayerHealth]] = {}
    for layer in layers:
        blocks.setdefault(layer.layer, []).append(layer)
    entropies = [sum(one.entropy for one in found) / len(found) for found in blocks.values()]
    loads = [max(one.load for one in found) for found in blocks.values()]
    return {
        "router_entropy": sum(layer.entropy for layer in layers) / len(layers),
        "router_entropy_by_layer": [round(entropy, 4) for entropy in entropies],
        "load": max(loads),
        "load_by_layer": [round(load, 4) for load in loads],
        "dead_experts": sum(len(layer.dead) for layer in layers),
        **_spent(layers),
    }


def _spent(layers: Sequence[LayerHealth]) -> dict[str, Any]:
    """Return what a log entry says of null experts, nothing without them."""
    shares = [layer.share for layer in layers if layer.share is not None]
    idle = [layer.idle for layer in layers if layer.idle is not None]
    if not shares or not idle:
        return {}
    return {
        "share": sum(shares) / len(shares),
        "share_by_layer": [round(share, 4) for share in shares],
        "idle": sum(idle) / len(idle),
    }


def collapsed(layers: Iterable[LayerHealth], threshold: float) -> list[LayerHealth]:
    """Return the layers whose busiest experts get `threshold` of the choices; 0 asks for none."""
    judged = [layer for layer in layers if layer.even]
    return [layer for layer in judged if threshold and layer.crowding >= threshold]


def warnings(layers: Sequence[LayerHealth], threshold: float) -> list[str]:
    """Return one line for the layers that collapsed, none when all is well."""
    bad = collapsed(layers, threshold)
    if not bad:
        return []
    worst = max(bad, key=lambda layer: layer.crowding)
    names = ", ".join(dict.fromkeys(str(layer.layer) for layer in bad))
    return [
        f"warning: routers collapsed in layer {names}: in layer {worst.layer} "
        f"{worst.crowding:.1%} of the choices go to the busiest experts, load max/mean "
        f"{worst.load:.2f}"
    ]


def check_routers(layers: Sequence[LayerHealth], threshold: float, steps: int) -> None:
    """Return only when no router sends nearly everything to the same experts.

    Args:
        layers: the last steps.
        threshold: share of the choices.
        steps: how many steps those were.

    Raises:
        TrainingError: one does; names the worst layer.
    """
    bad = collapsed(layers, threshold)
    if bad:
        worst = max(bad, key=lambda layer: layer.crowding)
        raise TrainingError(
            f"the router collapsed: over the last {steps} steps its busiest experts got "
            f"{worst.crowding:.1%} of the choices, {len(worst.dead)} of {len(worst.counts)} got "
            f"none ({len(bad)} of {len(layers)} layers are like this)",
            where=f"layer {worst.layer}",
            expected=f"less than {threshold:.0%}",
            hint="Raise --balance, lower --lr-of router, or accept it with --collapse 0.",
        )


def check_weights(parameters: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Return only when every parameter is finite.

    Raises:
        TrainingError: one is not; names it and the step.
    """
    seen = [(name, torch.isfinite(_here(p.detach())).all()) for name, p in parameters]
    if seen and not bool(torch.stack([flag for _, flag in seen]).all()):
        name = next(name for name, flag in seen if not bool(flag))
        raise TrainingError(
            f"tensor '{escape(name)}' is not finite; training stops",
            where=f"step {step}",
            hint="Lower --lr.",
        )


def _here(value: Any) -> Tensor:
    """Return the part of a tensor that lies in this process."""
    found: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return found


def check_number(what: str, step: int, value: Tensor) -> None:
    """Return only when a loss or the norm of a gradient is one that can be trained on.

    Raises:
        TrainingError: it is not finite, or a norm beyond `EXPLODED`; names the step.
    """
    found = float(value)
    if math.isfinite(found) and (what == "loss" or found <= EXPLODED):
        return
    raise TrainingError(
        f"the {what} is {found:.4g}; training stops",
        where=f"step {step}",
        hint="Lower --lr or --sparsity, lengthen --warmup, or look at the data there.",
    )


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Return what the user should know of the routers at the end.

    Args:
        summary: "routing" of a run's summary.
    """
    lines = []
    unused = [layer for layer in summary["layers"] if layer["dead"] and "site" in layer]
    if unused:
        lines.append(
            f"{len(unused)} routers left adapters without a token over the last "
            f"{summary['steps']} steps, that of {unused[0]['site']} {len(unused[0]['dead'])} of "
            f"{unused[0]['experts']}"
        )
    for layer in summary["layers"]:
        if layer["dead"] and "site" not in layer:
            named = ", ".join(map(str, layer["dead"][:8])) + ("..." if layer["dead"][8:] else "")
            lines.append(
                f"layer {layer['layer']}: {len(layer['dead'])} of {layer['experts']} experts got "
                f"no token over the last {summary['steps']} steps ({named})"
            )
    return [*lines, *_missed(summary.get("budgets", ()))]


def _missed(budgets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line for each budget that blocks are more than `MISSED` away from.

    Args:
        budgets: "layer", "target" and "share" of every block.
    """
    known = [b for b in budgets if b["target"] is not None and b["share"] is not None]
    missed: dict[float, list[Mapping[str, Any]]] = {}
    for budget in known:
        if abs(budget["share"] - budget["target"]) > MISSED:
            missed.setdefault(budget["target"], []).append(budget)
    lines = []
    for target, rows in missed.items():
        low, high = (f"{end(row['share'] for row in rows):.2f}" for end in (min, max))
        names = ", ".join(str(row["layer"]) for row in rows)
        one = len(rows) == 1
        lines.append(
            f"layer{'' if one else 's'} {names}: ran {low if low == high else f'{low} to {high}'} "
            f"of {'its' if one else 'their'} experts, budget {target:.2f}"
        )
    return lines
