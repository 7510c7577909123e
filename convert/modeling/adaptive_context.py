"""What one forward pass knows: which tokens are real, which knobs hold, who counts and collects.

The outer model makes one `Call` per forward pass and enters it in a context variable, so threads
and nested models each see their own and no module carries state from one call to the next.
Recomputation under gradient checkpointing runs in the call of the forward pass it repeats, marked
`recomputing`: it routes alike, and neither counts nor collects again.

Shapes: B sequences, S positions of this pass, T tokens in the order of the flattened [B, S], E
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass
class SiteAccount:
    """What one site did, summed over the passes counted.

    Attributes:
        slot: "ffn", "linear" for a network in place of a projection, or "adapters" for those of a
            linear, where a neuron is an adapter.
        tokens: tokens that reached the site, padding not counted.
        routed_tokens: those of them that a router looked at; with every expert on none runs.
        neurons: (token, neuron) pairs that were selected, always-on neurons included.
        executed: (token, neuron) pairs that were computed.
        experts: [E] how many tokens used each expert.
        idle: tokens that ran no expert at all; null experts allow it.
        neuron_flops, router_flops, gate_flops: FLOPs of one selected neuron, and of router and of a
            gate that is run in full, for one token. Of a mixture with null experts "gate" is the
            stock router, which every token passes, and "router" are the null experts' rows.
        neuron_bytes, router_bytes, gate_bytes: weight bytes of one neuron, of the router, and of a
            gate that is run in full.
    """

    neuron_flops: int
    router_flops: int
    gate_flops: int
    neuron_bytes: int
    router_bytes: int
    gate_bytes: int
    slot: str = "ffn"
    tokens: int = 0
    routed_tokens: int = 0
    neurons: int = 0
    executed: int = 0
    idle: int = 0
    experts: Tensor | None = None

    @property
    def ideal_flops(self) -> int:
        """Return the FLOPs of the selected neurons alone."""
        return self.neurons * self.neuron_flops

    @property
    def routed_flops(self) -> int:
        """Return the FLOPs of the selected neurons, the router and a gate run in full."""
        return self.ideal_flops + self._fixed_flops

    @property
    def executed_flops(self) -> int:
        """Return the FLOPs that were spent, masked neurons included."""
        return self.executed * self.neuron_flops + self._fixed_flops

    @property
    def _fixed_flops(self) -> int:
        return self.routed_tokens * self.router_flops + self.tokens * self.gate_flops

    @property
    def weight_bytes(self) -> int:
        """Return the weight bytes the tokens would read if each ran alone."""
        return self.neurons * self.neuron_bytes + self.fixed_bytes

    @property
    def fixed_bytes(self) -> int:
        """Return the part of `weight_bytes` that no selection saves: routers and full gates."""
        return self.routed_tokens * self.router_bytes + self.tokens * self.gate_bytes


@dataclass
class LayerAccount:
    """What one block that tokens may skip did.

    Attributes:
        tokens: that reached it, padding not counted.
        run: those of them that ran it.
    """

    tokens: int = 0
    run: int = 0


@dataclass
class Account:
    """What a model did, summed over the passes counted (1 MAC = 2 FLOPs).

    Attributes:
        tokens: tokens, padding not counted.
        sites: path -> what the site did.
        attention_flops: of scores and weighted sums, at the length each token really saw.
        static_flops, static_bytes: per token, everything outside sites and attention scores: the
            projections, norms left out, head included, embedding look-up not.
        reference: `config.adaptive.reference`.
        exit_flops, exit_bytes: of the tails of exits tokens were looked at.
        depth_flops, depth_bytes: of what decides which tokens skip a block, and of what these run
            instead.
        skipped_flops, skipped_bytes: of the above but sites, what tokens that left or skipped did
            not run.
        skipped_reference: these FLOPs with attention at the reference's length, which is what a
            fraction of the reference counts with.
    """

    static_flops: int
    static_bytes: int
    reference: Mapping[str, Any]
    tokens: int = 0
    attention_flops: int = 0
    exit_flops: int = 0
    exit_bytes: int = 0
    skipped_flops: int = 0
    skipped_bytes: int = 0
    skipped_reference: float = 0.0
    depth_flops: int = 0
    depth_bytes: int = 0
    sites: dict[str, SiteAccount] = field(default_factory=dict)
    layers: dict[str, LayerAccount] = field(default_factory=dict)
    block_costs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def flops_per_token(self) -> dict[str, float]:
        """Return routed FLOPs per token: "ffn" (selected neurons of feed-forward networks),
        "linear" (those of networks in place of projections), "adapters" (selected ones), "router"
        (routers and full gates), "exits" (their tails), "depth" (what decides who skips a block,
        and what these run instead) and "total" (these, the other projections, attention and head,
        less what tokens that left early or skipped did not run)."""
        tokens = max(self.tokens, 1)
        ideal = self._by_slot("ideal_flops")
        routed = sum(site.routed_flops for site in self.sites.values()) / tokens
        left = (self.exit_flops + self.depth_flops - self.skipped_flops) / tokens
        total = routed + self.static_flops + self.attention_flops / tokens + left
        router = routed - sum(ideal.values())
        added = {"exits": self.exit_flops / tokens, "depth": self.depth_flops / tokens}
        return {**ideal, "router": router, **added, "total": total}

    def weight_bytes_per_token(self) -> dict[str, float]:
        """Return the weight bytes a token reads when it runs alone, as batch-1 decoding does."""
        fixed = sum(self._by_slot("fixed_bytes").values())
        whole = self._by_slot("weight_bytes")
        chosen = {k: v - self._by_slot("fixed_bytes")[k] for k, v in whole.items()}
        added = self.exit_bytes + self.depth_bytes
        left = (added - self.skipped_bytes) / max(self.tokens, 1)
        total = sum(whole.values()) + self.static_bytes + left
        return {**chosen, "router": fixed, "total": total}

    def _by_slot(self, what: str) -> dict[str, float]:
        """Return a sum over the sites of each slot, per token."""
        found = dict.fromkeys(("ffn", "linear", "adapters"), 0.0)
        for site in self.sites.values():
            found[site.slot] += getattr(site, what) / max(self.tokens, 1)
        return found

    def compute(self) -> float:
        """Return routed FLOPs per token as a fraction of the reference at its stated length."""
        flops = self.flops_per_token()
        whole = self.reference["flops_per_token"]
        converted = self.reference["ffn_flops_per_token"]
        converted += self.reference.get("linear_flops_per_token", 0)
        routed = flops["ffn"] + flops["linear"] + flops["adapters"] + flops["router"]
        added = self.exit_flops + self.depth_flops
        routed += (added - self.skipped_reference) / max(self.tokens, 1)
        return float((whole - converted + routed) / whole)


@dataclass(frozen=True)
class Call:
    """One forward pass.

    Attributes:
        owner: the `Runtime` of the model it is a pass of.
        token_mask: [B, S] True for real tokens, None when all are.
        phase: "train", "prefill" or "decode".
        knobs: site path, or "*", -> selection that overrides the config's.
        account: who counts, None for nobody.
        collected: what -> site path -> list of tensors; empty when nobody collects.
        recomputing: this is the second run of a checkpointed segment.
        adapters: selection that overrides the config's at every linear with routed adapters.
        stage: which blocks run, in a model with exits; None for all.
        depth: rule by which tokens skip blocks that overrides the config's, None for none.
        seen: int64 [B, S] positions each token attends to where nothing slides, on the CPU; where
            somebody counts.
    """

    owner: object = None
    token_mask: Tensor | None = None
    phase: str = "prefill"
    knobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    account: Account | None = None
    collected: Mapping[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    recomputing: bool = False
    adapters: Mapping[str, Any] | None = None
    stage: Any = None
    depth: Mapping[str, Any] | None = None
    seen: Tensor | None = None

    def select(self, path: str) -> Mapping[str, Any] | None:
        """Return the selection that overrides the config's at a site, None for none."""
        return self.knobs.get(path) or self.knobs.get("*")

    def flat_mask(self, tokens: int) -> Tensor | None:
        """Return the mask for T flattened tokens, None when all are real."""
        if self.token_mask is None or self.token_mask.numel() != tokens:
            return None
        return self.token_mask.reshape(-1)


_CALL: ContextVar[Call | None] = ContextVar("adaptive_call", default=None)
_NOTHING = Call()


def current() -> Call:
    """Return the call this code runs in; outside a model's forward pass, one without knobs."""
    return _CALL.get() or _NOTHING


@contextmanager
def entered(call: Call) -> Iterator[Call]:
    """Run the body in `call`."""
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)


@contextmanager
def gathered(index: Tensor) -> Iterator[Call]:
    """Run the body on a part of the tokens; what a site sees of the call moves with them.

    Args:
        index: [T'] positions in the flattened [B, S], or [B, S'] positions in each sequence.
    """
    call = current()
    mask = call.token_mask
    if mask is not None:
        mask = mask.reshape(-1)[index] if index.dim() == 1 else mask.gather(1, index)
    with entered(replace(call, token_mask=mask)) as inner:
        yield inner


def checkpointed(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return a checkpoint function whose recomputation runs in the call of its first run.

    Args:
        inner: `torch.utils.checkpoint.checkpoint` or a partial of it: (function, *args) -> output.
    """

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = _CALL.get()
        if call is None:
            return inner(function, *args, **kwargs)
        first = [True]

        def segment(*a: Any, **k: Any) -> Any:
            own = call if first[0] else replace(call, recomputing=True)
            first[0] = False
            with entered(own):
                return function(*a, **k)

        return inner(segment, *args, **kwargs)

    return run
