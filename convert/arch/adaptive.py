"""Adaptive checkpoints as data: class names, own tensors, and what their config.json says.

An adaptive checkpoint is the dense one with its neurons in another order under the same names, a
few tensors more per converted feed-forward network, `config.adaptive`, and the runtime's code. One
of a mixture keeps every tensor as it is and has null experts beside them (`null_experts`). Early
exits add tensors of their own to either (`exits`).
Letters: E experts, m neurons of each, d hidden size, f = shared + E * m neurons, w router width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adaconvert.arch import null_experts, registry
from adaconvert.arch.adapters import adapter_tensors
from adaconvert.arch.base import ModelSpec, RuntimeVerdict, TensorSpec
from adaconvert.arch.exits import exit_tensors, exits_of
from adaconvert.arch.projections import replaced_tensors
from adaconvert.arch.recursion import with_recursion
from adaconvert.arch.routed_layers import layer_tensors
from adaconvert.arch.sites import FfnSite, ffn_site
from adaconvert.arch.values import WHERE
from adaconvert.errors import SourceError
from adaconvert.io.names import escape

VERSION = 1
PREFIX = "adaptive_"
NEURON_ORDER = "neuron_order"
#: routers without tensors of their own.
BARE_ROUTERS = ("oracle", "gate", "none")
ROUTERS = ("param-center", "similarity", "analytic", "contribution", *BARE_ROUTERS)
#: ending of a class name -> the auto class that loads it.
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMaskedImageModeling": "AutoModelForMaskedImageModeling",
}
#: every dense feed-forward network has one of them.
_UP = frozenset({"up", "gate_up"})
_OWN_KEYS = frozenset({"adaptive", "auto_map"})
#: families whose tokenizer transformers chooses by model_type when tokenizer_config.json has
#: no class; an adaptive checkpoint has a model_type of its own, so config.json names the class.
_TOKENIZERS = {
    "bert": "BertTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "olmo": "GPTNeoXTokenizer",
    "olmoe": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """How one feed-forward network is split, routed and run; the "ffn" slot of a site.

    Attributes:
        split: name of the split.
        permuted: its neurons were put in another order, which the checkpoint then holds.
        experts, width: E and m.
        shared: neurons in front that always run.
        router: {"kind": ...} and what the kind needs.
        select: {"rule": ...} and the value the rule needs.
        activation: None for the model's own, else a transformers name.
    """

    split: str
    permuted: bool
    experts: int
    width: int
    shared: int = 0
    router: Mapping[str, object] = field(default_factory=lambda: {"kind": "none"})
    select: Mapping[str, object] = field(default_factory=lambda: {"rule": "all"})
    activation: str | None = None

    def content(self, spec: ModelSpec, site: FfnSite) -> dict[str, object]:
        """Return the slot as config.json holds it."""
        elsewhere = {} if site.down_path is None else {"down_path": site.down_path}
        return {
            "weights": dict(site.weights),
            **elsewhere,
            "activation": self.activation or spec.traits.activation,
            "hidden": spec.hidden,
            "intermediate": spec.intermediate,
            "partition": {"split": self.split, "permuted": self.permuted},
            "experts": {"count": self.experts, "width": self.width},
            "shared": self.shared,
            "router": dict(self.router),
            "select": dict(self.select),
            "combine": "unit",
            "null": None,
        }


def router_tensors(
    router: Mapping[str, object], *, hidden: int, experts: int, gated: bool
) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a router, name after "router." -> shape; all are F32."""
    kind = router["kind"]
    if kind in {"param-center", "similarity"}:
        return {"weight": (experts, hidden)}
    if kind == "analytic":
        gate = {"gate": (experts, hidden)} if gated else {}
        return {**gate, "up": (experts, hidden), "bias": (experts,)}
    if kind == "contribution":
        width = router["width"]
        assert isinstance(width, int)
        return {"w1": (width, hidden), "w2": (experts, width)}
    return {}


def own_tensors(spec: ModelSpec, site: FfnSite, partition: Partition) -> Iterator[TensorSpec]:
    """Yield the tensors a converted site has beside the dense ones."""
    if partition.permuted:
        yield TensorSpec(
            name=f"{site.stored}.{NEURON_ORDER}",
            role=NEURON_ORDER,
            shape=(spec.intermediate,),
            layer=site.layer,
        )
    shapes = router_tensors(
        partition.router,
        hidden=spec.hidden,
        experts=partition.experts,
        gated=spec.traits.ffn == "glu",
    )
    for name, shape in shapes.items():
        yield TensorSpec(
            name=f"{site.stored}.router.{name}", role="router", shape=shape, layer=site.layer
        )


def base_of(spec: ModelSpec) -> dict[str, str]:
    """Return the stock classes under an adaptive model of a dense one, for `config.adaptive`."""
    stem = registry.FAMILIES[spec.model_type].stem
    return {
        "architecture": spec.architecture,
        "config": f"{stem}Config",
        "model_type": spec.model_type,
    }


def auto_map(spec: ModelSpec) -> dict[str, str]:
    """Return which class of the checkpoint's code each auto class of transformers loads."""
    stem = registry.FAMILIES[spec.model_type].stem
    classes = {"AutoModel": f"{stem}Model"}
    for ending, auto in _AUTO.items():
        if spec.architecture.endswith(ending):
            classes[auto] = spec.architecture
    return {
        "AutoConfig": f"configuration_adaptive.Adaptive{stem}Config",
        **{auto: f"modeling_adaptive.Adaptive{name}" for auto, name in classes.items()},
    }


def config_of(
    spec: ModelSpec,
    partitions: Mapping[int, Partition],
    reference: Mapping[str, int],
) -> dict[str, object]:
    """Return the config.json of an adaptive checkpoint.

    Args:
        spec: the dense source.
        partitions: by block; the others stay dense.
        reference: FLOPs of the source, see `planning.estimate.reference`.
    """
    sites = {}
    for layer, partition in sorted(partitions.items()):
        site = ffn_site(spec, layer)
        sites[site.path] = {"ffn": partition.content(spec, site)}
    return config_with(spec, sites, reference)


def config_with(
    spec: ModelSpec, sites: Mapping[str, object], reference: Mapping[str, int]
) -> dict[str, object]:
    """Return the config.json of an adaptive checkpoint with these sites.

    Args:
        spec: the stock source.
        sites: module path -> slots, as the contract has them.
        reference: FLOPs of the source, see `planning.estimate.reference`.
    """
    tokenizer = _TOKENIZERS.get(spec.model_type)
    named = {} if tokenizer is None else {"tokenizer_class": tokenizer}
    return {
        **named,
        **spec.config,
        "architectures": [f"Adaptive{spec.architecture}"],
        "model_type": f"{PREFIX}{spec.model_type}",
        "auto_map": auto_map(spec),
        "adaptive": {
            "version": VERSION,
            "base": base_of(spec),
            "reference": dict(reference),
            "sites": dict(sites),
            "model": {"exits": None, "recursion": None, "decode_policy": None},
            "calibration": None,
        },
    }


def dense_config(config: Mapping[str, object]) -> dict[str, object]:
    """Return the config.json of the stock model under an adaptive one.

    Raises:
        SourceError: `config.adaptive` does not name it.
    """
    adaptive = config.get("adaptive")
    base = adaptive.get("base") if isinstance(adaptive, dict) else None
    names = []
    if isinstance(base, dict):
        names = [base.get(key) for key in ("architecture", "model_type")]
    if not names or not all(isinstance(name, str) for name in names):
        raise _unusable("base", "architecture, config and model_type")
    kept = {key: value for key, value in config.items() if key not in _OWN_KEYS}
    if kept.get("tokenizer_class") == _TOKENIZERS.get(str(names[1])):
        kept.pop("tokenizer_class", None)
    return {**kept, "architectures": [names[0]], "model_type": names[1]}


def describe(config: Mapping[str, object], stored: Collection[str] = ()) -> ModelSpec:
    """Return what an adaptive checkpoint with this config.json holds.

    Args:
        config: config.json.
        stored: names in the files, as for `registry.describe`.

    Raises:
        SourceError: `config.adaptive` is unusable, or of a newer version.
    """
    adaptive = config.get("adaptive")
    if not isinstance(adaptive, dict):
        raise _unusable("", "an object")
    if adaptive.get("version") != VERSION:
        raise SourceError(
            "adaptive.version is not one this adaconvert knows",
            where=WHERE,
            expected=VERSION,
            found=escape(adaptive.get("version"), 40),
            hint="Upgrade adaconvert.",
        )
    spec = registry.describe(dense_config(config), stored)
    own = [
        tensor
        for site, partition in sites_of(spec, adaptive)
        for tensor in own_tensors(spec, site, partition)
    ]
    for mixture, nulls in null_experts.nulled(spec, adaptive):
        own += null_experts.tensors(spec, mixture, nulls)
    own += adapter_tensors(spec, adaptive)
    own += layer_tensors(spec, adaptive)
    exits = exits_of(adaptive)
    own += [made.tensor for made in exit_tensors(spec, exits)] if exits is not None else []
    tensors = (*with_recursion(replaced_tensors(spec, adaptive), spec, adaptive), *own)
    return replace(spec, tensors=tensors, adaptive=adaptive)


def sites_of(
    spec: ModelSpec, adaptive: Mapping[str, object]
) -> Iterator[tuple[FfnSite, Partition]]:
    """Yield the split feed-forward networks of an adaptive checkpoint, block by block; mixtures
    with null experts are not among them, see `null_experts.nulled`.

    Raises:
        SourceError: one is malformed or lies nowhere in the model.
    """
    sites = adaptive.get("sites")
    if not isinstance(sites, dict):
        raise _unusable("sites", "an object")
    known = {site.path: site for site in (ffn_site(spec, layer) for layer in _dense(spec))}
    split = {
        path: slots["ffn"]
        for path, slots in sites.items()
        if _is_map(slots, "ffn") and not null_experts.is_nulled(slots)
    }
    for path in split:
        if path not in known:
            raise SourceError(
                f"adaptive.sites names {escape(path, 80)!r}, where a {spec.architecture} has no "
                "feed-forward network",
                where=WHERE,
            )
    for path, site in known.items():
        if path in split:
            yield site, _partition(spec, path, split[path])


def _dense(spec: ModelSpec) -> list[int]:
    """Return the blocks with a dense feed-forward network."""
    return sorted({t.layer for t in spec.tensors if t.role in _UP and t.layer is not None})


def _partition(spec: ModelSpec, path: str, slot: Any) -> Partition:
    where = f"sites[{escape(path, 80)}].ffn"
    try:
        found = Partition(
            split=str(slot["partition"]["split"]),
            permuted=slot["partition"].get("permuted", True) is True,
            experts=_whole(slot["experts"]["count"]),
            width=_whole(slot["experts"]["width"]),
            shared=_whole(slot.get("shared", 0) or 0),
            router=dict(slot["router"]),
            select=dict(slot["select"]),
            activation=str(slot["activation"]),
        )
        kind, width = found.router["kind"], found.router.get("width", 1)
        _whole(width)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _unusable(where, "partition, experts, router and select") from None
    if found.shared + found.experts * found.width != spec.intermediate or found.experts < 1:
        raise _unusable(where, f"shared + experts.count * experts.width to be {spec.intermediate}")
    if kind not in ROUTERS:
        raise _unusable(f"{where}.router.kind", " or ".join(ROUTERS))
    return found


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(value)
    return value


def _is_map(value: object, key: str | None = None) -> bool:
    return isinstance(value, dict) and (key is None or key in value)


def _unusable(part: str, expected: str) -> SourceError:
    name = f"adaptive.{part}" if part else "adaptive"
    return SourceError(f"{name} is not usable", where=WHERE, expected=expected)


def active_share(spec: ModelSpec) -> dict[int, tuple[float, bool]]:
    """Return, for each split block, the share of neurons a token runs as configured (all of them
    where that depends on the token), and whether its gate matrix runs in full all the same."""
    if spec.adaptive is None:
        return {}
    found = {}
    for site, partition in sites_of(spec, spec.adaptive):
        chosen = partition.experts
        if partition.select.get("rule") == "top-k":
            chosen = min(_whole(partition.select.get("k", chosen)), chosen)
        neurons = partition.shared + chosen * partition.width
        share = neurons / spec.intermediate
        found[site.layer] = (share, partition.router["kind"] == "gate")
    return found


def verdicts() -> tuple[RuntimeVerdict, ...]:
    """Return what each runtime does with an adaptive checkpoint."""
    own = "no stock architecture; the code in the checkpoint is for transformers 5"
    return (
        RuntimeVerdict(
            runtime="transformers 5",
            verdict="right",
            why="with trust_remote_code=True, or without it after `import adaconvert.auto`",
        ),
        RuntimeVerdict(runtime="transformers 4.57", verdict="untested", why=own),
        RuntimeVerdict(runtime="vllm", verdict="untested", why=own),
        RuntimeVerdict(runtime="llama.cpp", verdict="refused", why="it does not know model_type"),
    )
