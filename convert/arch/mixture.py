"""The sparse blocks of a mixture of experts: where they lie, and how they choose and weigh.

Covered are routers whose scores are one softmax of the logits W x, of which the best k of all
experts are taken: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, FlexOlmo, GraniteMoE and DeepSeek-V2 with
greedy top-k. Everything else is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaconvert.arch import expressions, registry, values
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.family import Routing
from adaconvert.io.names import escape

#: weights of the chosen experts: divided by their sum, or those of the softmax over all experts.
RENORM = "renorm"
ALL = "all"
_GREEDY = "greedy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """One sparse block.

    Attributes:
        layer: index of the block.
        path: its module in memory, in the architecture config.json names.
        stored: what names of tensors of that module begin with on disk.
        router, experts: its children in memory.
        router_tensor: the router's weight [n, d] on disk.
        count: n, routed experts.
        width: m, neurons of each.
        top_k: k, experts per token.
        combine: `RENORM` or `ALL`.
        scaling: factor on every weight.
        float32: the router computes logits in float32, whatever the dtype of the model.
        glu: experts are gated.
    """

    layer: int
    path: str
    stored: str
    router: str
    experts: str
    router_tensor: str
    count: int
    width: int
    top_k: int
    combine: str = RENORM
    scaling: float = 1.0
    float32: bool = False
    glu: bool = True


def mixtures(spec: ModelSpec) -> tuple[Mixture, ...]:
    """Return the sparse blocks of a model, in order; none of one that `refusal` has words for.

    Raises:
        SourceError: a config value is unusable.
    """
    routing = registry.FAMILIES[spec.model_type].routing
    if routing is None or refusal(spec) is not None:
        return ()
    found = _values(spec)
    return tuple(_mixture(spec, routing, tensor, found) for tensor in _routers(spec))


def refusal(spec: ModelSpec) -> str | None:
    """Return why the routing of a model is not covered, named; None where it is.

    Raises:
        SourceError: a config value is unusable.
    """
    routing = registry.FAMILIES[spec.model_type].routing
    if routing is None:
        return f"no mixture of experts ({spec.model_type})"
    if routing.unlike:
        return f"{routing.unlike} ({spec.model_type})"
    if not _routers(spec):
        return f"no sparse block ({spec.model_type})"
    return _not_greedy(spec, routing.method) if routing.method else None


def _not_greedy(spec: ModelSpec, key: str) -> str | None:
    """Return how a model chooses where it does not take the best k of all experts."""
    stated = _values(spec)[key]
    if stated == _GREEDY:
        return None
    kind = "group-limited top-k" if "group" in str(stated) else "a choice that is not plain top-k"
    name = registry.FAMILIES[spec.model_type].keys[key].name
    return f"{kind} ({spec.model_type} with {name} {escape(str(stated), 60)})"


def _values(spec: ModelSpec) -> values.Values:
    family = registry.FAMILIES[spec.model_type]
    return values.read(family, spec.config, family.architectures[spec.architecture])


def _routers(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    return tuple(tensor for tensor in spec.tensors if tensor.role == "router")


def _mixture(
    spec: ModelSpec, routing: Routing, tensor: TensorSpec, found: values.Values
) -> Mixture:
    assert tensor.layer is not None
    scaling = expressions.evaluate(routing.scaling, found) if routing.scaling else 1.0
    assert isinstance(scaling, int | float)
    renormalised = expressions.holds(routing.renormalised, found)
    return Mixture(
        layer=tensor.layer,
        path=routing.path.format(layer=tensor.layer),
        stored=(routing.stored or routing.path).format(layer=tensor.layer),
        router=routing.router,
        experts=routing.experts,
        router_tensor=tensor.name,
        count=spec.num_experts,
        width=_width(spec, tensor.layer),
        top_k=spec.top_k,
        combine=RENORM if renormalised else ALL,
        scaling=float(scaling),
        float32=routing.float32,
        glu=spec.traits.ffn == "glu",
    )


def _width(spec: ModelSpec, layer: int) -> int:
    """Return the neurons of each expert of a sparse block."""
    for tensor in spec.tensors:
        if tensor.layer != layer:
            continue
        if tensor.role == "expert_up":
            return tensor.shape[0]
        if tensor.role == "expert_gate_up":
            return tensor.shape[1] // 2
    raise ValueError(f"block {layer} has a router and no experts")
