"""The schema of `config.adaptive`, version 1, and what may be combined with what.

    adaptive = {
        version,
        base:        {architecture, config, model_type},     the stock classes underneath
        reference:   {flops_per_token, ffn_flops_per_token, length},   the dense source
        sites:       {module path: {slot: spec}},            slots: "linear", "ffn", "layer"
        model:       {exits, recursion, decode_policy},     exits: see adaptive_exit_schema.py
        calibration: None, or the measured compute/loss table,
    }

An "ffn" site whose down projection lies in another module (BERT) has no "down" among its weights
and names that matrix's path in `down_path`; it returns the masked hidden units.

A "linear" slot holds {"mlp": ...} where a two-layer network split into experts stands in for the
module's matrix; it is described as an "ffn" is, with the width of its `output` and which of its
two layers have a `bias`.

Or it holds {"adapters", "router", "select"}: E routed adapters beside the matrix.

    adapters: {kind: "lora", count, rank, share: None | "a", scaling: number | [E], input, output}
              {kind: "ia3", count, on: "input" | "output", input, output}
    router:   {kind: "none"}: uniform gates; or {kind: "linear", reads: "module" | "layer" |
              "shared", of: path of the linear that holds it, input: its width, score, norm, scale}
    select:   {rule, k | p, renormalize}

An "ffn" site may be a sparse block of a mixture with null experts: then `mixture` says where its
router and experts are and how it weighs them, `null` what is beside them, and the rules are "null"
(the configuration's decision; `bias` in place of the stored one), "all" (the source's decision) and
"top-k" (k real experts).

A slot is filled by one class (`SLOTS` in adaptive_slots.py); methods edit the fields of a slot's
spec and never replace one another's modules. This file needs no torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from .adaptive_checks import AdaptiveConfigError as AdaptiveConfigError
from .adaptive_checks import check_keys, check_whole, is_number
from .adaptive_depth_schema import check_layer
from .adaptive_exit_schema import check_exits
from .adaptive_recursion_schema import check_recursion

VERSION = 1
#: built inside out.
SLOT_ORDER = ("linear", "ffn", "layer")
RULES: Mapping[str, str | None] = {
    "all": None,
    "top-k": "k",
    "dynamic-k": "tau",
    "threshold": "threshold",
    "top-p": "p",
    "null": "bias",
}
#: the rules at a mixture with null experts; "null" is of these sites alone.
MIXTURE_RULES = ("null", "all", "top-k")
ROUTERS = ("none", "oracle", "gate", "param-center", "similarity", "analytic", "contribution")
#: pairs of things a model may hold that cannot be combined, and why; every other pair composes.
REFUSED: Mapping[frozenset[str], str] = {
    frozenset({"model.recursion", "model.exits"}): (
        "an exit inside a shared block would leave at every pass"
    ),
}
_TOP = {"version", "base", "reference", "sites", "model", "calibration", "origin"}
_MODEL = {"exits", "recursion", "decode_policy"}


#: version -> the function that turns a config of that version into one of the next; pure.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def read(adaptive: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked copy of `config.adaptive` in the present version.

    Raises:
        AdaptiveConfigError: it is newer than this code, or something in it is wrong.
    """
    if not isinstance(adaptive, Mapping):
        raise AdaptiveConfigError(
            f"config.adaptive is {type(adaptive).__name__}, expected an object"
        )
    version = adaptive.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise AdaptiveConfigError(f"config.adaptive.version is {version!r}, expected {VERSION}")
    if version > VERSION:
        raise AdaptiveConfigError(
            f"config.adaptive.version is {version} and this code knows up to {VERSION}: "
            "install a newer adaconvert, or load with the checkpoint's own code "
            "(trust_remote_code=True)"
        )
    known = copy.deepcopy(dict(adaptive))
    while known["version"] < VERSION:
        known = MIGRATIONS[known["version"]](known)
    check_keys("config.adaptive", known, _TOP)
    check_keys("config.adaptive.model", known.get("model") or {}, _MODEL)
    if not isinstance(known.get("sites"), Mapping):
        raise AdaptiveConfigError("config.adaptive has no sites")
    for path, slots in known["sites"].items():
        _check_site(path, slots)
    _check_apart(known["sites"])
    check_composition(known)
    if (known.get("model") or {}).get("exits"):
        check_exits("config.adaptive.model.exits", known["model"]["exits"])
    if (known.get("model") or {}).get("recursion"):
        check_recursion("config.adaptive.model.recursion", known["model"]["recursion"])
    return known


def routed_specs(adaptive: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, by path, the description of every site that chooses experts: of feed-forward
    networks, and of networks in place of projections."""
    found = {}
    for path, slots in adaptive["sites"].items():
        spec = slots.get("ffn") or (slots.get("linear") or {}).get("mlp")
        if spec is not None:
            found[path] = spec
    return found


def routed_layers(adaptive: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, by path, the description of every block that tokens may skip."""
    sites = adaptive.get("sites", {})
    return {path: slots["layer"] for path, slots in sites.items() if "layer" in slots}


def parts(adaptive: Mapping[str, Any]) -> set[str]:
    """Return the names of what a model holds: slots that are filled, and parts of the model."""
    found = {slot for slots in adaptive.get("sites", {}).values() for slot in slots}
    model = adaptive.get("model") or {}
    return found | {f"model.{name}" for name in ("exits", "recursion") if model.get(name)}


def check_composition(adaptive: Mapping[str, Any]) -> None:
    """Refuse what cannot be combined.

    Raises:
        AdaptiveConfigError: naming the pair and the reason.
    """
    held = parts(adaptive)
    for pair, reason in REFUSED.items():
        if pair <= held:
            names = " and ".join(sorted(pair))
            raise AdaptiveConfigError(f"{names} cannot be combined: {reason}")


def _check_site(path: str, slots: Mapping[str, Any]) -> None:
    where = f"config.adaptive.sites[{path!r}]"
    check_keys(where, slots, set(SLOT_ORDER))
    if "ffn" in slots:
        check_keys(f"{where}.ffn", slots["ffn"], _FFN)
        _check_experts(f"{where}.ffn", slots["ffn"])
        if "mixture" in slots["ffn"]:
            check_mixture(f"{where}.ffn", slots["ffn"])
    if "layer" in slots:
        check_layer(f"{where}.layer", slots["layer"])
    linear = slots.get("linear")
    if isinstance(linear, Mapping) and "mlp" in linear:
        check_keys(f"{where}.linear", linear, {"mlp"})
        _check_mlp(f"{where}.linear.mlp", linear["mlp"])
    elif isinstance(linear, Mapping):
        check_adapters(f"{where}.linear", linear)


_EXPERTS = {
    *("weights", "activation", "hidden", "intermediate", "partition", "experts", "shared"),
    *("router", "select"),
}
_FFN = {*_EXPERTS, "combine", "null", "down_path", "mixture"}
_MLP = {*_EXPERTS, "role", "output", "bias", "quality"}


def _check_mlp(where: str, spec: Mapping[str, Any]) -> None:
    check_keys(where, spec, _MLP)
    check_keys(f"{where}.bias", spec.get("bias"), {"up", "down"})
    sizes = [spec.get(name) for name in ("hidden", "output", "intermediate")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise AdaptiveConfigError(f"{where}: hidden, output and intermediate are {sizes}")
    if spec.get("weights") != {"up": "up", "down": "down"} or len(spec["bias"]) != 2:
        raise AdaptiveConfigError(f"{where} needs weights up and down, and bias of both")
    _check_experts(where, spec)


def _check_apart(sites: Mapping[str, Any]) -> None:
    """Refuse a network in place of a matrix that is part of another site's experts."""
    for path, slots in sites.items():
        outer = path.rpartition(".")[0]
        if "mlp" in (slots.get("linear") or {}) and "ffn" in sites.get(outer, {}):
            raise AdaptiveConfigError(
                f"config.adaptive.sites[{path!r}].linear.mlp stands for a matrix of the split "
                f"network {outer!r}"
            )


def _check_experts(where: str, spec: Mapping[str, Any]) -> None:
    try:
        count, width = spec["experts"]["count"], spec["experts"]["width"]
        total, shared = spec["intermediate"], spec.get("shared", 0)
        kind, select = spec["router"]["kind"], spec["select"]
    except (KeyError, TypeError) as error:
        raise AdaptiveConfigError(f"{where} lacks {error}") from None
    if min(count, width) < 1 or shared < 0 or shared + count * width != total:
        raise AdaptiveConfigError(
            f"{where}: {shared} shared neurons and {count} experts of {width} do not make "
            f"{total} neurons"
        )
    kinds = ("mixture",) if "mixture" in spec else ROUTERS
    if kind not in kinds:
        raise AdaptiveConfigError(f"{where}.router.kind is {kind!r}, known: {', '.join(kinds)}")
    if spec.get("combine", "unit") != "unit":
        raise AdaptiveConfigError(f"{where}.combine is {spec['combine']!r}, known: unit")
    check_select(f"{where}.select", select, count, mixture="mixture" in spec)


def check_select(
    where: str, select: Mapping[str, Any], experts: int, *, mixture: bool = False
) -> None:
    """Refuse a selection that means nothing.

    Args:
        where: named in the message.
        select: {"rule": ..., and the value the rule needs}.
        experts: routed experts of the site.
        mixture: the site is a mixture with null experts.

    Raises:
        AdaptiveConfigError: unknown rule, or its value is missing or out of range.
    """
    rule = str(select.get("rule"))
    known = MIXTURE_RULES if mixture else tuple(rule for rule in RULES if rule != "null")
    if rule not in known:
        raise AdaptiveConfigError(f"{where}.rule is {rule!r}, known: {', '.join(known)}")
    name = RULES[rule]
    if name is None or (rule == "null" and "bias" not in select):
        return
    value = select.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdaptiveConfigError(f"{where}: {rule} needs a number {name}, found {value!r}")
    limits = {"k": (1, experts), "tau": (0.0, 1.0), "p": (0.0, 1.0)}
    if name in limits:
        low, high = limits[name]
        if not low <= value <= high:
            raise AdaptiveConfigError(f"{where}.{name} is {value}, expected {low} to {high}")
    if name == "k" and value != int(value):
        raise AdaptiveConfigError(f"{where}.k is {value}, expected a whole number")


_MIXTURE = {"router", "experts", "top_k", "combine", "scaling", "float32", "glu"}
_NULL = {"count", "slots", "kind", "weights", "gain", "min_real", "target", "start"}
_CHOICES = {
    "mixture.combine": ("renorm", "all"),
    "null.kind": ("zero", "identity", "constant"),
    "null.weights": ("real", "selected"),
}


def check_mixture(where: str, spec: Mapping[str, Any]) -> None:
    """Refuse null experts or a mixture that mean nothing.

    Args:
        where: named in the message.
        spec: of the site.

    Raises:
        AdaptiveConfigError: a key is missing or unknown, or a value is out of range.
    """
    for part, keys in (("mixture", _MIXTURE), ("null", _NULL)):
        check_keys(f"{where}.{part}", spec.get(part), keys)
        missing = sorted(keys - {"target", "start"} - set(spec[part]))
        if missing:
            raise AdaptiveConfigError(f"{where}.{part} lacks {', '.join(missing)}")
    for name, known in _CHOICES.items():
        part, key = name.split(".")
        found = spec[part][key]
        if found not in known:
            listed = ", ".join(map(str, known))
            raise AdaptiveConfigError(f"{where}.{name} is {found!r}, known: {listed}")
    experts, null = spec["experts"]["count"], spec["null"]
    check_whole(f"{where}.experts.count", experts, None)
    check_whole(f"{where}.null.min_real", null["min_real"], 1, least=0)
    check_whole(f"{where}.mixture.top_k", spec["mixture"]["top_k"], experts)
    check_whole(f"{where}.null.count", null["count"], None)
    # more slots than experts could not all be filled
    check_whole(f"{where}.null.slots", null["slots"], experts + null["count"])
    for name, found in (
        ("mixture.scaling", spec["mixture"]["scaling"]),
        ("null.gain", null["gain"]),
    ):
        if not is_number(found) or found <= 0:
            raise AdaptiveConfigError(f"{where}.{name} is {found!r}, expected a number above 0")
    target = null.get("target")
    if target is not None and not (is_number(target) and target >= 0):
        raise AdaptiveConfigError(
            f"{where}.null.target is {target!r}, expected null or a number, 0 or more"
        )


#: rule of routed adapters -> the name of its value.
GATE_RULES: Mapping[str, str | None] = {
    "soft": None,
    "uniform": None,
    "sigmoid": None,
    "top-k": "k",
    "top-p": "p",
}
_ADAPTERS = {
    "lora": {"kind", "count", "rank", "share", "scaling", "input", "output"},
    "ia3": {"kind", "count", "on", "input", "output"},
}
_OF_BLOCKS = {"of", "input"}
_ROUTER = {"kind", "reads", "score", "norm", "scale", *_OF_BLOCKS}
_ADAPTER_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "adapters.share": (None, "a"),
    "adapters.on": ("input", "output"),
    "router.kind": ("none", "linear"),
    "router.reads": ("module", "layer", "shared"),
    "router.score": ("dot", "abs"),
    "router.norm": ("none", "layernorm"),
}


def check_adapters(where: str, slot: Mapping[str, Any]) -> None:
    """Refuse routed adapters that mean nothing.

    Args:
        where: named in the message.
        slot: the "linear" slot of a site.

    Raises:
        AdaptiveConfigError: a key is missing or unknown, or a value is out of range.
    """
    check_keys(where, slot, {"adapters", "router", "select"})
    try:
        adapters, router, select = slot["adapters"], slot["router"], slot["select"]
        known = _ADAPTERS.get(adapters["kind"], set())
        check_keys(f"{where}.adapters", adapters, known)
        check_keys(f"{where}.router", router, _ROUTER)
        asked = {f"adapters.{name}": adapters[name] for name in sorted(known)}
        asked["router.kind"] = router["kind"]
        if router["kind"] != "none":
            named = _ROUTER - (_OF_BLOCKS if router["reads"] == "module" else set())
            asked |= {f"router.{name}": router[name] for name in sorted(named)}
    except (KeyError, TypeError) as error:
        raise AdaptiveConfigError(f"{where} lacks {error}") from None
    for name, value in asked.items():
        if name in _ADAPTER_CHOICES and value not in _ADAPTER_CHOICES[name]:
            listed = ", ".join(map(str, _ADAPTER_CHOICES[name]))
            raise AdaptiveConfigError(f"{where}.{name} is {value!r}, known: {listed}")
        if name.rpartition(".")[2] in ("count", "rank", "input", "output"):
            check_whole(f"{where}.{name}", value, None)
    each = asked.get("adapters.scaling", 1.0)
    each = each if isinstance(each, list | tuple) else [each] * adapters["count"]
    if len(each) != adapters["count"] or not all(map(is_number, each)):
        raise AdaptiveConfigError(f"{where}.adapters.scaling is {adapters['scaling']!r}")
    owner, scale = asked.get("router.of"), asked.get("router.scale", 1.0)
    if ("router.of" in asked and not isinstance(owner, str)) or not is_number(scale):
        raise AdaptiveConfigError(f"{where}.router has of {owner!r} and scale {scale!r}")
    check_gates(f"{where}.select", select, adapters["count"])


def check_gates(where: str, select: Mapping[str, Any], count: int) -> None:
    """Refuse a selection of routed adapters that means nothing.

    Args:
        where: named in the message.
        select: {"rule", its value, "renormalize"}.
        count: adapters of the linear.

    Raises:
        AdaptiveConfigError: unknown rule, or its value is missing or out of range.
    """
    rule = str(select.get("rule"))
    if rule not in GATE_RULES:
        raise AdaptiveConfigError(f"{where}.rule is {rule!r}, known: {', '.join(GATE_RULES)}")
    name = GATE_RULES[rule]
    check_keys(where, select, {"rule", "renormalize", *([name] if name else [])})
    if not isinstance(select.get("renormalize"), bool | None):
        raise AdaptiveConfigError(f"{where}.renormalize is {select['renormalize']!r}, no boolean")
    if name is None:
        return
    value, most = select.get(name), count if name == "k" else 1
    kinds = (int,) if name == "k" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:
        raise AdaptiveConfigError(
            f"{where}: {rule} needs {name} above 0, at most {most}: {value!r}"
        )
