"""What a split model computes as it is configured: how far from dense, and at what cost.

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.verification.logits import LogitDifference, compare_logits
from adaconvert.verification.models import run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way of running a model.

    Attributes:
        neurons: of those the source runs for a token in the converted networks, the share that
            runs.
        ffn: FLOPs of the split networks, routers and full gates included, over those of what they
            were in the dense model.
        loss: nats per token more than the dense model; None for models of no text to come.
        logits: difference from the dense model's.
        real: real experts per token of a mixture with null ones, None for split networks.
    """

    neurons: float
    ffn: float
    loss: float | None
    logits: LogitDifference
    real: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A split model as it is configured.

    Attributes:
        width: neurons of an expert.
        configured: as config.json says.
        single: as many neurons, chosen one by one by the model's own gate; None where the network
            has no gate or experts are single neurons already.
    """

    width: int
    configured: Setting
    single: Setting | None = None

    def advice(self) -> list[str]:
        """Return what the numbers mean for a user, one sentence each."""
        if self.single is None or self.configured.loss is None or self.single.loss is None:
            return []
        mine, other = self.configured, self.single
        if mine.logits.kl <= other.logits.kl:
            return []
        text = (
            f"experts of {self.width} neurons without training change the loss by {mine.loss:+.2g} "
            f"nats per token at {mine.neurons:.0%} of the neurons; as many single neurons, chosen "
            f"by the model's own gate, by {other.loss:+.2g} (at {other.ffn:.0%} of the FLOPs of "
            "these networks, because the gate runs in full): use --router gate with "
            "--expert-width 1, or train this split (d2dmoe)"
        )
        return [text]


def measure(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    dense: torch.Tensor,
    *,
    tolerance: float,
) -> Quality | None:
    """Return the quality of an adaptive model as configured, None when it runs every expert.

    Args:
        model: the adaptive model; its sites are changed while this runs.
        inputs: what it runs on.
        dense: what the dense model gave for them, [B, S, V].
        tolerance: see `compare_logits`.
    """
    from adaconvert.modeling.adaptive_select import runs_all

    adaptive: Any = model
    specs = [site.adaptive_spec for site in adaptive.adaptive_sites().values()]
    if all(runs_all(spec["select"], spec["experts"]["count"]) for spec in specs):
        return None
    configured = _setting(model, inputs, dense, tolerance)
    # of the feed-forward networks, where there are also networks in place of projections
    named = [spec for spec in specs if "output" not in spec] or specs
    width = named[0]["experts"]["width"]
    gated = all("gate" in s["weights"] or "gate_up" in s["weights"] for s in specs)
    single = None
    if width > 1 and gated and configured.neurons < 1:
        _choose_neurons(model, configured.neurons)
        single = _setting(model, inputs, dense, tolerance)
    return Quality(width=width, configured=configured, single=single)


def _setting(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    dense: torch.Tensor,
    tolerance: float,
) -> Setting:
    adaptive: Any = model
    with adaptive.account() as account:
        found = run(model, inputs)
    sites = account.sites
    specs = {path: adaptive.adaptive_sites()[path].adaptive_spec for path in sites}
    total = sum(site.tokens * _neurons(specs[path]) for path, site in sites.items())
    mixed = [site for path, site in sites.items() if "mixture" in specs[path]]
    neurons = sum(site.neurons for site in sites.values()) / max(total, 1)
    source = adaptive.config.adaptive["reference"]
    reference = source["ffn_flops_per_token"] + source.get("linear_flops_per_token", 0)
    flops = account.flops_per_token()
    return Setting(
        neurons=neurons,
        ffn=(flops["ffn"] + flops["linear"] + flops["router"]) / max(reference, 1),
        loss=_loss_increase(model, inputs, dense, found),
        logits=compare_logits(dense, found, tolerance=tolerance),
        real=_uses(mixed) / max(sum(site.tokens for site in mixed), 1) if mixed else None,
    )


def _neurons(spec: Mapping[str, Any]) -> int:
    """Return the neurons the source runs for a token at a site."""
    if "mixture" in spec:
        return int(spec["mixture"]["top_k"] * spec["experts"]["width"])
    return int(spec["intermediate"])


def _uses(sites: list[Any]) -> int:
    """Return how often real experts ran at mixtures with null ones."""
    return sum(int(site.experts.sum()) for site in sites if site.experts is not None)


def _choose_neurons(model: PreTrainedModel, share: float) -> None:
    """Let every site choose single neurons by its gate, `share` of them per token."""
    adaptive: Any = model
    for site in adaptive.adaptive_sites().values():
        total = site.adaptive_spec["intermediate"]
        site.adaptive_spec = {
            **site.adaptive_spec,
            "experts": {"count": total, "width": 1},
            "shared": 0,
            "router": {"kind": "gate"},
            "select": {"rule": "top-k", "k": max(round(share * total), 1)},
        }
        site.router = None


def _loss_increase(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    dense: torch.Tensor,
    found: torch.Tensor,
) -> float | None:
    """Return by how many nats per token a language model predicts the next token worse."""
    ids = inputs.get("input_ids")
    if ids is None or not model.can_generate() or ids.shape[1] < 2:
        return None
    return _loss(found, ids) - _loss(dense, ids)


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    from torch.nn.functional import cross_entropy

    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return float(cross_entropy(flat.float(), ids[:, 1:].reshape(-1)))
