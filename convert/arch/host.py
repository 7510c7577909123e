"""Which stock MoE architecture a dense model goes to: the exact one that most runtimes load."""

from __future__ import annotations

import difflib
from dataclasses import replace

from adaconvert.arch import fit
from adaconvert.arch.base import HostRequest, ModelSpec
from adaconvert.arch.hosts import (
    dots1,
    ernie4_5_moe,
    flex_olmo,
    glm4_moe,
    granitemoe,
    granitemoeshared,
    mixtral,
    qwen2_moe,
    qwen3_moe,
)
from adaconvert.arch.hosts.base import Host, SharedExpert
from adaconvert.errors import OptionError
from adaconvert.io.names import escape

__all__ = ["EXACT_FAMILIES", "HOSTS", "Host", "SharedExpert", "choose", "exact_hosts"]

_MODULES = (
    mixtral,
    qwen3_moe,
    granitemoe,
    granitemoeshared,
    qwen2_moe,
    glm4_moe,
    flex_olmo,
    ernie4_5_moe,
    dots1,
)
#: every host, the one most runtimes load right first.
HOSTS: dict[str, Host] = {module.HOST.model_type: module.HOST for module in _MODULES}

#: what to use instead when a source has no exact host.
EXACT_FAMILIES = (
    "gemma, granite, llama, mistral, olmo, olmo2, olmo3 (full attention only), phi3, qwen2, qwen3"
)


def exact_hosts(spec: ModelSpec, request: HostRequest) -> list[Host]:
    """Return the hosts that hold the model exactly, the best choice first.

    A host made for the source's family comes first, one that would store the embedding twice comes
    last, and between the others `HOSTS` decides.
    """
    fitting = [host for host in HOSTS.values() if not host.reasons(spec, request)]
    return sorted(
        fitting, key=lambda host: (spec.model_type not in host.kin, fit.unties(host, spec))
    )


def choose(spec: ModelSpec, request: HostRequest, target: str = "auto") -> Host:
    """Return the host `target` names, or with "auto" the best one that holds the model exactly.

    Raises:
        OptionError: no host of that name exists, or it cannot hold the model; every feature that
            does not fit is named, and what will work.
    """
    if target == "auto":
        fitting = exact_hosts(spec, request)
        if fitting:
            return fitting[0]
        raise _refusal(spec, request, None)
    if target not in HOSTS:
        raise _unknown(target)
    if HOSTS[target].reasons(spec, request):
        raise _refusal(spec, request, HOSTS[target])
    return HOSTS[target]


def _unknown(target: str) -> OptionError:
    near = difflib.get_close_matches(target, HOSTS, n=1)
    return OptionError(
        f"there is no target '{escape(target, 60)}'",
        where="--target",
        expected=f"auto, {', '.join(HOSTS)}",
        hint=f"Did you mean {near[0]}?" if near else None,
    )


def _refusal(spec: ModelSpec, request: HostRequest, asked: Host | None) -> OptionError:
    host = asked or min(HOSTS.values(), key=lambda host: len(host.reasons(spec, request)))
    found = "; ".join(host.reasons(spec, request))
    if asked is None:
        message = f"no MoE architecture of transformers holds this {spec.model_type} model exactly"
        message = f"{message}. The nearest, {host.model_type}, cannot hold: {found}"
    else:
        message = f"{host.model_type} cannot hold this {spec.model_type} model exactly: {found}"
    return OptionError(message, where="--target", hint=_alternative(spec, request))


def _alternative(spec: ModelSpec, request: HostRequest) -> str:
    """Return what will work, asking for less where that helps."""
    fitting = exact_hosts(spec, request)
    if fitting:
        return f"Use --target {' or '.join(host.model_type for host in fitting)}."
    plain = replace(request, shared_kind="none", shared_width=0)
    everywhere = replace(request, moe_layers=frozenset())
    both = replace(plain, moe_layers=frozenset())
    for smaller, words in (
        (plain, "Without a shared expert"),
        (everywhere, "With every block converted"),
        (both, "Without a shared expert and with every block converted"),
    ):
        fitting = exact_hosts(spec, smaller)
        if smaller != request and fitting:
            return f"{words}, {fitting[0].model_type} holds it."
    return f"Models of these families have an exact host: {EXACT_FAMILIES}."
