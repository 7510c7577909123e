"""Where kernels were measured to be faster or slower than torch.

`ROWS` is data: a new measurement is a new row and changes nothing else. A kernel is chosen on its
own account only where a row says that it is faster; where none fits the call, it was not measured.

No kernel has been measured on a GPU yet. The rows there are without a ratio were derived from sizes
and bandwidths; they hold until measurements replace them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adaconvert.kernels import triton_support


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement, and the calls it speaks for.

    Attributes:
        op: operation, a key of `dispatch.KERNELS`.
        backend: of the kernel.
        device: type of device, as torch names it.
        capability: of the device that was measured; other ones are not judged by it. None for all.
        sizes: fact -> least and most value it speaks for, both included, None for no bound. Facts
            are those of the call and of `sizes_of`; a call that does not tell one does not fit.
        equal: fact -> values it speaks for; dtype, glu and the like.
        ratio: time of torch's path over that of the kernel; above 1 the kernel is faster. None
            where it was not measured but derived that the kernel is slower.
        source: where the number is from: file, device, date and commit.
    """

    op: str
    backend: str = "triton"
    device: str = "cuda"
    capability: tuple[int, int] | None
    sizes: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    equal: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ratio: float | None
    source: str

    def fits(self, op: str, backend: str, facts: Mapping[str, Any]) -> bool:
        """Return whether the row speaks for this call."""
        if (self.op, self.backend, self.device) != (op, backend, facts.get("device")):
            return False
        if self.capability not in (None, facts.get("capability")):
            return False
        return all(_within(facts.get(name), *ends) for name, ends in self.sizes.items()) and all(
            facts.get(name) in values for name, values in self.equal.items()
        )


#: 5 us of launches and the router against reading the rest at 85% of 4.3 TB/s (NVIDIA H200).
_DERIVED = "derived from bandwidth and launches for one token, not measured"
ROWS: tuple[Row, ...] = tuple(
    Row(op=op, capability=None, sizes=sizes, ratio=None, source=_DERIVED)
    for op in ("expert_ffn", "dynk_decode")
    for sizes in ({"bytes": (None, 50e6)}, {"share": (0.7, None)})
)


def loses(op: str, backend: str, facts: dict[str, Any]) -> str | None:
    """Return why torch runs this call rather than the kernel, None where the kernel was faster.

    Where several rows fit, the least favourable one decides.
    """
    known = {**facts, **sizes_of(facts), "capability": triton_support.capability_of(facts)}
    least = None
    # a plain loop, which torch.compile can trace
    for row in ROWS:
        if row.fits(op, backend, known) and (least is None or _ratio(row) < _ratio(least)):
            least = row
    if least is None:
        return "not measured for these sizes on this device; ADACONVERT_KERNELS=triton runs it"
    if _ratio(least) > 1:
        return None
    found = "torch is faster" if least.ratio is None else f"{least.ratio:.2f} times torch's speed"
    return f"{found} where {_limits(least)} ({least.source})"


def _ratio(row: Row) -> float:
    return 0.0 if row.ratio is None else row.ratio


def sizes_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return what rows may ask about a call beside its facts, where the facts tell.

    - bytes: of the weights of the whole network.
    - share: of its neurons that run for a token, at most.
    """
    found: dict[str, float] = {}
    neurons = facts.get("neurons")
    if not neurons:
        return found
    if all(facts.get(name) is not None for name in ("hidden", "dtype", "glu")):
        matrices = 2 + bool(facts["glu"])
        found["bytes"] = matrices * neurons * facts["hidden"] * facts["dtype"].itemsize
    if all(facts.get(name) is not None for name in ("selected", "width")):
        running = facts.get("shared", 0) + facts["selected"] * facts["width"]
        found["share"] = min(1.0, running / neurons)
    return found


def _within(value: float | None, least: float | None, most: float | None) -> bool:
    if value is None:
        return False
    return (least is None or value >= least) and (most is None or value <= most)


def _limits(row: Row) -> str:
    """Return in words what calls a row speaks for."""
    ranges = [
        f"{name} is {'up to ' if least is None else ''}{most if least is None else least:g}"
        f"{' or more' if most is None else '' if least is None else f' to {most:g}'}"
        for name, (least, most) in row.sizes.items()
    ]
    named = [f"{name} is {' or '.join(map(str, values))}" for name, values in row.equal.items()]
    return " and ".join(ranges + named) or "it was measured"
