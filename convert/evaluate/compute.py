"""What running a model cost per token: counted by adaptive models, estimated for stock ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaconvert.errors import AdaconvertError
from adaconvert.evaluate.real_experts import null_sites
from adaconvert.evaluate.usage import SiteUsage

if TYPE_CHECKING:
    from adaconvert.io.source import Source

_STORED_AS = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
}
_FLOATS = frozenset(_STORED_AS.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Costs per token; 1 MAC = 2 FLOPs.

    Attributes:
        counted: the model counted what it did; otherwise the numbers come from shapes alone.
        flops: attention at its real length, head, routers and all.
        ffn_flops: of these, of the neurons that were chosen; where there are routed adapters, also
            of networks that choose none, and of adapters on linears of either; in a stock model,
            of the feed-forward networks with their routers.
        router_flops: of routers, and of gates that are run in full; None where not told apart.
        projection_flops: of the chosen neurons of networks in place of projections; None where not
            told apart.
        executed_flops: as `flops`, with every neuron that was computed and then masked; None in a
            stock model.
        weight_bytes: bytes of weights a token reads when it runs alone, as in batch-1 decoding.
        ffn_bytes: of these, as in `ffn_flops`; None where not told apart.
        fraction: routed FLOPs over those of the dense reference, None without one.
    """

    counted: bool
    flops: float
    ffn_flops: float
    weight_bytes: float
    router_flops: float | None = None
    projection_flops: float | None = None
    executed_flops: float | None = None
    ffn_bytes: float | None = None
    fraction: float | None = None

    def to_json(self) -> dict[str, object]:
        """Return the costs by name."""
        return {
            "counted": self.counted,
            "flops_per_token": self.flops,
            "ffn_flops_per_token": self.ffn_flops,
            "router_flops_per_token": self.router_flops,
            "projection_flops_per_token": self.projection_flops,
            "executed_flops_per_token": self.executed_flops,
            "weight_bytes_per_token": self.weight_bytes,
            "ffn_weight_bytes_per_token": self.ffn_bytes,
            "fraction_of_reference": self.fraction,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beside:
    """What the account of a model with routed adapters does not tell of its feed-forward networks.

    Attributes:
        flops: per token, of the matrices that choose nothing.
        unseen: of these, of experts that are no modules of their own, which nobody counts.
        width: bytes of a weight.
        paths: the linears of the networks.
    """

    flops: int
    unseen: int
    width: int
    paths: frozenset[str]

    @classmethod
    def of(cls, model: Any, static_flops: int) -> _Beside | None:
        """Return what is to be added, None for a model without routed adapters.

        Args:
            model: an adaptive model.
            static_flops: of the account.
        """
        from adaconvert.arch.adapters import linears
        from adaconvert.arch.projections import stock_spec
        from adaconvert.arch.registry import describe
        from adaconvert.planning.estimate import is_of_ffn, unchosen_flops

        if not model.adaptive_adapters():
            return None
        spec = describe(model.config.to_dict())
        every, ffn = unchosen_flops(spec)
        found = linears(stock_spec(spec)).items()
        return cls(
            flops=ffn,
            unseen=every - static_flops if spec.num_experts else 0,
            width=model.dtype.itemsize,
            paths=frozenset(path for path, linear in found if is_of_ffn(linear.role)),
        )

    def added_to(self, rates: Mapping[str, float], account: Any) -> dict[str, float]:
        """Return rates per token with what is missing in them."""
        tokens = max(account.tokens, 1)
        adapters = {p: s for p, s in account.sites.items() if s.slot == "adapters"}
        # one A for all adapters is no gate
        tied = sum(site.tokens * site.gate_flops for site in adapters.values()) / tokens
        own = [site for path, site in adapters.items() if path in self.paths]
        flops = sum(s.ideal_flops + s.tokens * s.gate_flops for s in own) / tokens
        size = sum(s.neurons * s.neuron_bytes + s.tokens * s.gate_bytes for s in own) / tokens
        each = self.width / 2
        return {
            **rates,
            "flops": rates["flops"] + self.unseen,
            "bytes": rates["bytes"] + self.unseen * each,
            "ffn": rates["ffn"] + self.flops + flops,
            "ffn_bytes": rates["ffn_bytes"] + self.flops * each + size,
            "router": rates["router"] - tied,
        }


class Tally:
    """Adds up the accounts of several passes of one model at one setting."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: dict[str, float] = {}
        self._uses: dict[str, Any] = {}
        self._seen: dict[str, int] = {}
        self._idle: dict[str, int] = {}
        self._nulls: dict[str, int] = {}
        self._beside: _Beside | None = None

    @contextmanager
    def counting(self, model: Any) -> Iterator[None]:
        """Add what the model does in the body; nothing when it does not count."""
        if not hasattr(model, "account"):
            yield
            return
        self._nulls = null_sites(model)
        with model.account() as account:
            yield
        if not self.tokens:
            self._beside = _Beside.of(model, account.static_flops)
        self._add(account)

    def _add(self, account: Any) -> None:
        flops, size = account.flops_per_token(), account.weight_bytes_per_token()
        masked = sum(s.executed_flops - s.routed_flops for s in account.sites.values())
        rates = {
            "flops": flops["total"],
            "ffn": flops["ffn"],
            "router": flops["router"],
            "linear": flops["linear"],
            "bytes": size["total"],
            "ffn_bytes": size["ffn"],
            "fraction": account.compute(),
        }
        if self._beside is not None:
            rates = self._beside.added_to(rates, account)
        for name, rate in rates.items():
            self._sums[name] = self._sums.get(name, 0.0) + rate * account.tokens
        self._sums["masked"] = self._sums.get("masked", 0.0) + masked
        self.tokens += account.tokens
        for path, site in account.sites.items():
            uses = site.experts.cpu().numpy().astype("int64")
            self._uses[path] = uses if path not in self._uses else self._uses[path] + uses
            self._seen[path] = self._seen.get(path, 0) + int(site.tokens)
            if path in self._nulls:
                self._idle[path] = self._idle.get(path, 0) + int(site.idle)

    def compute(self) -> Compute | None:
        """Return the mean per token, None when nothing was counted."""
        if not self.tokens:
            return None
        mean = {name: total / self.tokens for name, total in self._sums.items()}
        return Compute(
            counted=True,
            flops=mean["flops"],
            ffn_flops=mean["ffn"],
            router_flops=mean["router"],
            projection_flops=mean["linear"],
            executed_flops=mean["flops"] + mean["masked"],
            weight_bytes=mean["bytes"],
            ffn_bytes=mean["ffn_bytes"],
            fraction=mean["fraction"],
        )

    def usage(self) -> tuple[SiteUsage, ...]:
        """Return how the experts of each site were used, site by site."""
        return tuple(
            SiteUsage.of(
                path,
                uses,
                self._seen[path],
                source_k=self._nulls.get(path, 0),
                idle=self._idle.get(path, 0),
            )
            for path, uses in self._uses.items()
        )


def estimated(
    source: Source, lengths: Mapping[int, int], dtype: str | None = None
) -> Compute | None:
    """Return what a stock checkpoint costs by its shapes, None for a family we cannot describe.

    Args:
        source: the checkpoint.
        lengths: length of a text that was evaluated -> how many there were.
        dtype: what weights were loaded as, such as "torch.float32"; None for as stored.
    """
    from adaconvert.arch.registry import describe
    from adaconvert.planning.estimate import attention_flops, costs

    try:
        spec = describe(source.config, source.tensors)
    except AdaconvertError:
        return None
    loaded = _STORED_AS.get(str(dtype))
    dtypes = {
        name: loaded if loaded is not None and ref.dtype in _FLOATS else ref.dtype
        for name, ref in source.tensors.items()
    }
    found = costs(spec, dtypes, 0)
    return Compute(
        counted=False,
        flops=found.flops + attention_flops(spec, lengths),
        ffn_flops=float(found.ffn_flops),
        weight_bytes=float(found.weight_bytes),
    )


def relative_to(compute: Compute | None, reference: Compute | None) -> Compute | None:
    """Return the costs with the fraction of a reference's FLOPs, where they have none."""
    if compute is None or reference is None or compute.fraction is not None:
        return compute
    return replace(compute, fraction=compute.flops / reference.flops)
