"""Early exits as data: where a model can be left, and the tensors an exit has of its own.

An exit at k lies after k blocks, 0 < k < L. Everything it has of its own begins as a copy of a
tensor of the model, but for an affine map (the identity), a classifier (zeros) and the tokens a
draft chooses among. `modeling.adaptive_exit_schema` says what `config.adaptive.model.exits` holds.
Letters: L blocks, d hidden size, V vocabulary, n tokens a draft chooses among.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaconvert.arch import registry
from adaconvert.arch.adapters import Linear, adapted, block_of, linears
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.projections import networks_of, stock_spec
from adaconvert.arch.sites import ffn_site
from adaconvert.arch.values import WHERE
from adaconvert.errors import SourceError

#: kind of head -> (own tail, affine map, branch of the host block's network, block of its own).
KINDS: Mapping[str, tuple[bool, bool, bool, bool]] = {
    "shared": (False, False, False, False),
    "affine": (False, True, False, False),
    "norm": (True, False, False, False),
    "mlp": (True, False, True, False),
    "layer": (True, False, False, True),
    "full": (True, False, True, True),
}
#: roles of the tensors exits add.
EXIT_ROLES = frozenset(
    {
        *("exit_norm", "exit_pooler", "exit_head", "exit_network", "exit_block", "exit_map"),
        *("exit_confidence", "exit_draft_tokens"),
    }
)
DRAFT_TOKENS = "exit_draft_tokens"
CAUSAL, CLASSIFIER = "causal", "classifier"
#: families whose stock code loops over all blocks whatever config.num_hidden_layers says, so that
#: `generate(assistant_early_exit=k)` fails there.
NOT_SLICED = frozenset({"gpt2", "gpt_neox"})
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")
_UP = frozenset({"up", "gate_up"})
_OF_HEAD = frozenset({"at", "own", "map", "network", "block", "confidence"})
_NETWORK = re.compile(r"(gate_up|gate|up|down)(_bias)?")
_TAIL = {
    "norm": ("norm_final", "norm_final_bias"),
    "pooler": ("pooler", "pooler_bias"),
    "head": ("head", "head_bias", "classifier", "classifier_bias"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where exits of a model can lie.

    Attributes:
        kind: `CAUSAL` or `CLASSIFIER`.
        blocks: path of the list of blocks in memory.
        tail: "norm", "pooler" and "head" -> path of a module that follows the blocks.
        networks: block -> name of its feed-forward network, of those that are dense and one module.
        scale: factor on what blocks add to the residual stream.
    """

    kind: str
    blocks: str
    tail: Mapping[str, str]
    networks: Mapping[int, str]
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitTensor:
    """One tensor of an exit.

    Attributes:
        tensor: its name, role and shape.
        origin: the stock tensor it begins as a copy of, None for none.
        value: what it is filled with where it is no copy: "eye", "zeros" or "tokens".
    """

    tensor: TensorSpec
    origin: str | None = None
    value: str = ""


def exits_of(adaptive: Mapping[str, object] | None) -> dict[str, Any] | None:
    """Return `config.adaptive.model.exits`; None where a model has none.

    Raises:
        SourceError: it is malformed.
    """
    model = None if adaptive is None else adaptive.get("model")
    found = model.get("exits") if isinstance(model, dict) else None
    if found is None:
        return None
    try:
        usable = _is_usable(found)
    except (KeyError, TypeError):
        usable = False
    if not usable:
        raise SourceError(
            "adaptive.model.exits is not usable",
            where=WHERE,
            expected="blocks, tail, heads by `at`, decide, kv and draft",
        )
    exits: dict[str, Any] = found
    return exits


def _is_usable(found: Any) -> bool:
    """Return whether exits say all that they must; raises what their types do otherwise."""
    heads, draft = found["heads"], found["draft"]
    places = [head["at"] for head in heads]
    return (
        all(type(at) is int and 0 < at < 2**31 for at in places)
        and all(set(head) >= _OF_HEAD for head in heads)
        and places == sorted(set(places))
        and all(set(head["own"]) <= set(found["tail"]) for head in heads)
        and (draft is None or draft["at"] in places)
        and (draft is None or draft["vocab"] is None or type(draft["vocab"]) is int)
        and len(found["decide"]["thresholds"]) == len(places)
    )


def is_taken(exits: Mapping[str, Any]) -> bool:
    """Return whether some exit may be taken as configured."""
    decide = exits["decide"]
    if decide["measure"] == "patience":
        count = decide["patience"]
        return isinstance(count, int) and count < len(exits["heads"])
    return any(threshold is not None for threshold in decide["thresholds"])


def refusal(spec: ModelSpec) -> str | None:
    """Return why a model cannot have exits, what is missing named; None where it can."""
    if spec.kind != "decoder" and not spec.architecture.endswith(_CLASSIFIERS):
        return (
            f"{spec.architecture} has no head whose result an exit could give early: exits are for "
            "causal language models and for classifiers of a text or an image"
        )
    roles = {tensor.role for tensor in spec.tensors}
    if not roles & {"head", "classifier"}:
        return f"{spec.architecture} has no head"
    if spec.kind != "decoder":
        needed = "pooler" if spec.kind == "encoder" else "norm_final"
        return None if needed in roles else f"{spec.architecture} has no {needed}"
    if "norm_final" not in roles and spec.traits.norm != "layernorm_no_params":
        return f"{spec.architecture} has no final norm"
    return None


def places_of(spec: ModelSpec) -> Places:
    """Return where exits of a model can lie; `refusal` must be None for it.

    Args:
        spec: of any checkpoint; of an adaptive one the stock model underneath counts.
    """
    stock = stock_spec(spec)
    blocks = block_of(next(iter(linears(stock)))).rpartition(".")[0]
    tail = {"norm": _norm(stock, blocks), "pooler": _module(stock, "pooler")}
    if stock.kind == "encoder":
        del tail["norm"]
    else:
        del tail["pooler"]
    tail["head"] = "lm_head" if stock.kind == "decoder" else _module(stock, "classifier")
    return Places(
        kind=CAUSAL if stock.kind == "decoder" else CLASSIFIER,
        blocks=blocks,
        tail=tail,
        networks=_networks(stock, blocks),
        scale=stock.traits.residual_scale,
    )


def _norm(spec: ModelSpec, blocks: str) -> str:
    """Return the path of the final norm; one without parameters is not in the files."""
    return _module(spec, "norm_final") or f"{blocks.rpartition('.')[0]}.norm"


def _module(spec: ModelSpec, role: str) -> str:
    """Return the path in memory of the module that holds a tensor of a role; "" for none."""
    name = next((tensor.name for tensor in spec.tensors if tensor.role == role), None)
    if name is None:
        return ""
    family = registry.FAMILIES[spec.model_type]
    stored = name.removesuffix(".weight").removesuffix(".dense")
    bare = "prefixed" in family.architectures[spec.architecture]
    if role == "classifier" or not bare or stored.startswith(family.prefix):
        return stored
    return family.prefix + stored


def _networks(spec: ModelSpec, blocks: str) -> dict[int, str]:
    dense = {t.layer for t in spec.tensors if t.role in _UP and t.layer is not None}
    found = {}
    for layer in sorted(dense):
        site = ffn_site(spec, layer)
        if site.down_path is None:
            found[layer] = site.path.removeprefix(f"{blocks}.{layer}.")
    return found


def uncopied(spec: ModelSpec, layer: int, *, block: bool) -> str | None:
    """Return why a stock copy of a block's network, or of all of it, would not compute what the
    block computes; None where it would.

    Args:
        spec: of any checkpoint.
        layer: index of the block.
        block: of the whole block.
    """
    stock, adaptive = stock_spec(spec), spec.adaptive or {}
    if _is_sparse(stock, layer):
        return f"block {layer} is a mixture of experts, of which an exit gets no copy"
    if not block and layer not in places_of(spec).networks:
        return f"the blocks of a {spec.architecture} have no feed-forward network of one module"
    sites = [slots.get("ffn") for slots in _slots(adaptive, stock, layer)]
    if any(site and site.get("activation") != stock.traits.activation for site in sites):
        return f"block {layer} was split with another activation than the model's"
    for linear, _ in adapted(stock, adaptive) if adaptive else ():
        if linear.layer == layer and (block or _NETWORK.fullmatch(linear.role)):
            return f"{linear.path} has routed adapters, which a copy would lack"
    for site, _ in networks_of(stock, adaptive) if adaptive and block else ():
        if site.layer == layer:
            return f"a network stands in place of {site.path}, so its matrix is gone"
    return None


def is_copied(spec: ModelSpec, linear: Linear) -> bool:
    """Return whether an exit of a checkpoint has a copy of one of its linears."""
    exits = exits_of(spec.adaptive)
    for head in () if exits is None else exits["heads"]:
        if head["network"] and linear.layer == head["at"] - 1 and _NETWORK.fullmatch(linear.role):
            return True
        if head["block"] and linear.layer == spec.layers - 1:
            return True
    return False


def _is_sparse(spec: ModelSpec, layer: int) -> bool:
    return any(t.layer == layer and t.role == "router" for t in spec.tensors)


def _slots(adaptive: Mapping[str, Any], spec: ModelSpec, layer: int) -> Iterator[dict[str, Any]]:
    """Yield the slots of a dense block's feed-forward network."""
    sites = adaptive.get("sites")
    if isinstance(sites, dict):
        yield sites.get(ffn_site(spec, layer).path) or {}


def exit_tensors(spec: ModelSpec, exits: Mapping[str, Any]) -> Iterator[ExitTensor]:
    """Yield every tensor exits have of their own, in the order they are written.

    Args:
        spec: of the stock model underneath.
        exits: `config.adaptive.model.exits`.

    Raises:
        SourceError: an exit lies outside the model, or has what the model has not.
    """
    for head in exits["heads"]:
        if head["at"] >= spec.layers:
            raise SourceError(
                f"adaptive.model.exits has an exit after {head['at']} blocks",
                where=WHERE,
                expected=f"1 to {spec.layers - 1}",
            )
        yield from _tail_tensors(spec, head)
        if head["network"]:
            yield from _network_tensors(spec, head["at"])
        if head["block"]:
            yield from _block_tensors(spec, head["at"])
        yield from _new_tensors(spec, head, exits["draft"])


def _tail_tensors(spec: ModelSpec, head: Mapping[str, Any]) -> Iterator[ExitTensor]:
    for role in head["own"]:
        known = [t for t in spec.tensors if t.role in _TAIL[role] and t.layer is None]
        for tensor in known:
            kind = "bias" if tensor.role.endswith("_bias") else "weight"
            inner = ".dense" if role == "pooler" else ""
            name = f"exits.{head['at']}.{role}{inner}.{kind}"
            yield _copied(name, f"exit_{role}", tensor, _tied(spec, tensor))


def _tied(spec: ModelSpec, tensor: TensorSpec) -> str:
    """Return the stored tensor a head is: the embedding, where the two are tied."""
    if tensor.role == "head" and spec.traits.tied:
        return next(t.name for t in spec.tensors if t.role == "embed")
    return tensor.name


def _network_tensors(spec: ModelSpec, at: int) -> Iterator[ExitTensor]:
    if not any(t.layer == at - 1 and t.role in _UP for t in spec.tensors):
        raise SourceError(
            f"adaptive.model.exits has a branch of block {at - 1}, which has no dense network",
            where=WHERE,
        )
    children = ffn_site(spec, at - 1).weights
    for tensor in spec.tensors:
        if tensor.layer == at - 1 and _NETWORK.fullmatch(tensor.role):
            kind = "bias" if tensor.role.endswith("_bias") else "weight"
            child = children.get(tensor.role.removesuffix("_bias"), tensor.role)
            yield _copied(f"exits.{at}.network.{child}.{kind}", "exit_network", tensor, tensor.name)


def _block_tensors(spec: ModelSpec, at: int) -> Iterator[ExitTensor]:
    last = spec.layers - 1
    for tensor in spec.tensors:
        if tensor.layer == last:
            rest = tensor.name.partition(f".{last}.")[2]
            yield _copied(f"exits.{at}.block.{rest}", "exit_block", tensor, tensor.name)


def _copied(name: str, role: str, tensor: TensorSpec, origin: str) -> ExitTensor:
    made = TensorSpec(name=name, role=role, shape=tensor.shape, transposed=tensor.transposed)
    return ExitTensor(tensor=made, origin=origin)


def _new_tensors(spec: ModelSpec, head: Mapping[str, Any], draft: Any) -> Iterator[ExitTensor]:
    at, size = head["at"], spec.hidden
    if head["map"]:
        yield _made(f"exits.{at}.map.weight", "exit_map", (size, size), "eye")
        yield _made(f"exits.{at}.map.bias", "exit_map", (size,), "zeros")
    if head["confidence"]:
        yield _made(f"exits.{at}.confidence.weight", "exit_confidence", (1, size), "zeros")
        yield _made(f"exits.{at}.confidence.bias", "exit_confidence", (1,), "zeros")
    if draft is not None and draft["at"] == at and draft["vocab"] is not None:
        yield _made(f"exits.{at}.draft_tokens", DRAFT_TOKENS, (draft["vocab"],), "tokens")


def _made(name: str, role: str, shape: tuple[int, ...], value: str) -> ExitTensor:
    return ExitTensor(tensor=TensorSpec(name=name, role=role, shape=shape), value=value)


def checked(spec: ModelSpec) -> Iterator[TensorSpec]:
    """Yield the matrices a token passes through besides the model's own where it looks at every
    exit that may be taken as configured, and takes none; one that several exits share, as often.

    What runs once per text, the pooler and head of a classifier, is left out.

    Args:
        spec: of any checkpoint.
    """
    exits = exits_of(spec.adaptive)
    if exits is None or not is_taken(exits):
        return
    stock, decide = stock_spec(spec), exits["decide"]
    per_text = ("exit_pooler", "exit_head") if exits["kind"] == CLASSIFIER else ()
    own = [t for t in spec.tensors if t.role in EXIT_ROLES and len(t.shape) > 1]
    for head, threshold in zip(exits["heads"], decide["thresholds"], strict=True):
        if threshold is None and decide["measure"] != "patience":
            continue
        yield from (
            tensor
            for tensor in own
            if tensor.name.startswith(f"exits.{head['at']}.") and tensor.role not in per_text
        )
        if exits["kind"] == CAUSAL and "head" not in head["own"]:
            yield next(tensor for tensor in stock.tensors if tensor.role == "head")
