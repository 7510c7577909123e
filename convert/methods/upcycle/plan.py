"""From opened sources and options to the plan of an upcycling run; reads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from adaconvert.arch.base import (
    HostLayout,
    HostRequest,
    HostTensor,
    ModelSpec,
    RuntimeVerdict,
)
from adaconvert.arch.host import HOSTS, Host, choose
from adaconvert.arch.runtimes import verdicts
from adaconvert.dtypes import BY_NAME
from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.methods.hosting import Carrier, check_runs, dtype_of, rounds
from adaconvert.methods.sources import Described
from adaconvert.methods.upcycle.config import DTYPES, UpcycleConfig, parse_layers
from adaconvert.methods.upcycle.experts import ExpertBuilder
from adaconvert.planning.accounting import check_plan, pieces_of
from adaconvert.planning.ops import (
    Drop,
    Exactness,
    Plan,
    TargetTensor,
)

#: widest shared expert that is added for a host that cannot do without one.
NEUTRAL_WIDTH = 64
#: matrix widths the grouped GEMM of every backend takes: rows of 16 bytes in 16-bit dtypes.
WIDTH_MULTIPLE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcyclePlan:
    """A plan with what the estimate and the executor want to know beside it."""

    plan: Plan
    host: Host
    layout: HostLayout
    request: HostRequest
    described: tuple[Described, ...]

    @property
    def target(self) -> str:
        """Return the model_type of the result."""
        return self.host.model_type

    @property
    def runtimes(self) -> tuple[RuntimeVerdict, ...]:
        """Return what each runtime does with the result."""
        return verdicts(self.plan.config)

    @property
    def files(self) -> Mapping[str, bytes]:
        """Return nothing: the result needs no further files."""
        return {}

    @property
    def folder(self) -> None:
        """Return nothing: the result is a checkpoint."""
        return None


def host_request(config: UpcycleConfig, spec: ModelSpec) -> HostRequest:
    """Return what the options ask of a host for this model.

    Raises:
        OptionError: the FFN's width does not divide as asked.
    """
    total = spec.intermediate
    shared = 0
    if config.shared_experts == "split":
        shared = config.shared_width or total // 2 // WIDTH_MULTIPLE * WIDTH_MULTIPLE
    elif config.shared_experts == "neutral":
        shared = config.shared_width or min(NEUTRAL_WIDTH, total)
    if shared > total:
        raise OptionError(
            "is wider than the dense FFN",
            where="--shared-width",
            expected=f"1 to {total}",
            found=shared,
        )
    routed = total - (shared if config.shared_experts == "split" else 0)
    if routed < 1:
        raise OptionError(
            "leaves no neurons for the routed experts",
            where="--shared-width",
            expected=f"less than {total}",
            found=shared,
        )
    if routed % config.granularity:
        raise OptionError(
            f"{routed} neurons (intermediate_size {total}) do not divide into "
            f"{config.granularity} equal experts",
            where="--granularity",
            expected=f"a divisor of {routed}",
            found=config.granularity,
        )
    return HostRequest(
        num_experts=config.experts,
        top_k=config.top_k,
        expert_width=routed // config.granularity,
        shared_width=shared,
        shared_kind=config.shared_experts,
        moe_layers=parse_layers(config.layers, spec.layers),
        aux_loss_coef=config.aux_loss_coef,
    )


def base_index(config: UpcycleConfig, sources: Sequence[Source]) -> int | None:
    """Return the source everything outside FFNs is taken from, or None for the average of all.

    Raises:
        OptionError: `base` names none of the sources.
    """
    if len(sources) == 1:
        # a finished run's options name the one source
        if config.base not in ("average", sources[0].label):
            raise OptionError("needs several sources", where="--base", found=escape(config.base))
        return 0
    if config.base == "average":
        return None
    typed = Path(config.base).expanduser().absolute()
    by_path = [i for i, source in enumerate(sources) if source.root.absolute() == typed]
    by_label = [i for i, source in enumerate(sources) if source.label == config.base]
    for found in (by_path, by_label):
        if len(found) == 1:
            return found[0]
    raise OptionError(
        "names several sources; give its path" if by_label else "is none of the sources",
        where="--base",
        expected="average or one of: " + ", ".join(s.label for s in sources),
        found=config.base,
    )


def exactness_of(config: UpcycleConfig, sources: int, rounds: bool) -> Exactness:
    """Return what this variant promises about step 0."""
    if config.drop > 0:
        return Exactness(
            kind="needs-training",
            why=f"{config.drop:g} of every expert's neurons are re-drawn (Drop-Upcycling)",
        )
    if sources > 1:
        return Exactness(
            kind="needs-training",
            why=f"experts of {sources} models behind untrained routers (Branch-Train-MiX)",
        )
    if config.noise > 0:
        return Exactness(
            kind="approximate", why=f"experts carry noise of {config.noise:g} standard deviations"
        )
    if rounds:
        return Exactness(
            kind="exact-fp32",
            why="the same function before the stored dtype rounds the tensors that are computed",
        )
    why = "all experts hold the dense feed-forward network and their weights sum to 1"
    if config.shared_experts == "split":
        why = (
            "the shared expert and the routed ones, whose weights sum to 1, hold the dense "
            "feed-forward network between them"
        )
    if config.granularity > 1:
        why = (
            "every chosen group of experts holds the whole dense feed-forward network, in float32; "
            "in bfloat16 equal router logits of two groups can break a group, verify counts how "
            "often"
        )
    return Exactness(kind="exact", why=why)


def _notes(config: UpcycleConfig, host: Host, layout: HostLayout) -> tuple[str, ...]:
    notes = list(layout.notes)
    if config.granularity > 1 and not host.router_in_float32:
        notes.append(
            f"{host.model_type} computes router logits in the model's dtype: in 16 bits two groups "
            f"can tie and break; {_float32_routers()} compute them in float32"
        )
    if config.top_k == 1 and config.granularity == 1:
        notes.append(
            "top-1 with renormalised weights always weighs 1, so the language loss gives the "
            "router no gradient"
        )
    if config.router_init == "zeros" and config.top_k < config.experts:
        notes.append("a zero router sends every token to the same experts until it is trained")
    return tuple(notes)


def _float32_routers() -> str:
    return ", ".join(name for name, host in HOSTS.items() if host.router_in_float32)


def _group(tensor: HostTensor) -> str:
    if tensor.expert is None:
        return tensor.name
    return f"layer.{tensor.layer}.expert.{tensor.expert}"


def host_targets(
    config: UpcycleConfig, layout: HostLayout, builder: ExpertBuilder, carrier: Carrier
) -> tuple[TargetTensor, ...]:
    """Return every tensor of a mixture as its host lays it out."""
    asked = DTYPES[config.dtype]
    first = builder.specs[0].ffn_rows(0)["up"].tensor
    default = builder.stored[0][first].dtype
    targets = []
    for tensor in layout.tensors:
        if tensor.carry is not None:
            expr = carrier.build(tensor.carry, tensor.shape)
        else:
            expr = builder.build(tensor)
        targets.append(
            TargetTensor(
                name=tensor.name,
                dtype=dtype_of(expr, asked, default),
                shape=tensor.shape,
                expr=expr,
                group=_group(tensor),
                layer=tensor.layer,
                expert=tensor.expert,
            )
        )
    return tuple(targets)


def _drops(
    described: Sequence[Described], targets: Sequence[TargetTensor], base: int | None
) -> tuple[Drop, ...]:
    """Return every source tensor no target reads, each with the reason it is not needed."""
    used = {(p.source, p.tensor) for t in targets for p in pieces_of(t.expr)}
    drops = []
    for index, item in enumerate(described):
        for name in item.source.tensors:
            if (index, name) in used:
                continue
            reason = item.audit.dropped.get(name)
            if reason is None and base is not None and index != base:
                reason = f"taken from {described[base].source.label} (--base)"
            if reason is not None:
                drops.append(Drop(source=index, tensor=name, reason=reason))
    return tuple(drops)


def build_plan(
    config: UpcycleConfig, described: Sequence[Described], prompts_digest: str = ""
) -> UpcyclePlan:
    """Return the complete, checked plan of one run.

    Args:
        config: the options.
        described: opened and audited sources, already found to agree with each other.
        prompts_digest: sha256 of the router prompts, "" unless `router_init` is "hidden".

    Raises:
        OptionError: the options do not fit the model, or no host holds it exactly.
    """
    spec = described[0].spec
    sources = [d.source for d in described]
    _check_sources(config, len(sources))
    request, host = choose_host(config, spec)
    base = base_index(config, sources)
    first = described[0].source.tensors[spec.ffn_rows(0)["up"].tensor]
    main_dtype = DTYPES[config.dtype] or first.dtype
    check_runs(request, main_dtype)
    layout = host.layout(spec, request, BY_NAME[main_dtype].config_name)
    stored = [s.tensors for s in sources]
    builder = ExpertBuilder(
        config=config,
        specs=[d.spec for d in described],
        stored=stored,
        layout=layout,
        expert_width=request.expert_width,
        first_routed=request.shared_width if config.shared_experts == "split" else 0,
        prompts_digest=prompts_digest,
    )
    targets = host_targets(config, layout, builder, Carrier(stored=stored, base=base))
    lossy = any(rounds(t.expr, t.dtype) for t in targets)
    plan = Plan(
        method="upcycle",
        options=_options(config, host, sources, base, prompts_digest),
        sources=tuple(s.fingerprint for s in sources),
        targets=targets,
        drops=_drops(described, targets, base),
        config=layout.config,
        exactness=exactness_of(config, len(sources), lossy),
        notes=_notes(config, host, layout),
    )
    check_plan(plan, stored)
    return UpcyclePlan(
        plan=plan, host=host, layout=layout, request=request, described=tuple(described)
    )


def choose_host(config: UpcycleConfig, spec: ModelSpec) -> tuple[HostRequest, Host]:
    """Return the host and what it is asked for.

    Some hosts count their shared expert in routed-expert widths; a neutral one whose width the user
    left open takes that width when no host takes the narrow one.
    """
    request = host_request(config, spec)
    try:
        return request, choose(spec, request, config.target)
    except OptionError:
        if config.shared_experts != "neutral" or config.shared_width is not None:
            raise
        wide = replace(request, shared_width=request.expert_width)
        try:
            return wide, choose(spec, wide, config.target)
        except OptionError:
            pass
        raise


def _check_sources(config: UpcycleConfig, count: int) -> None:
    groups = config.experts // config.granularity
    if groups % count:
        raise OptionError(
            f"{count} sources cannot share {groups} full experts equally",
            where="--experts",
            expected=f"a multiple of {count * config.granularity}",
            found=config.experts,
        )
    if count > 1 and config.shared_experts == "split":
        raise OptionError(
            "a shared part of the FFN cannot come from several sources",
            where="--shared-experts",
            expected="none or neutral",
            found="split",
        )


def _options(
    config: UpcycleConfig,
    host: Host,
    sources: Sequence[Source],
    base: int | None,
    prompts_digest: str,
) -> dict[str, object]:
    """Return the resolved options for the manifest: no paths, every default spelled out."""
    options: dict[str, object] = asdict(config)
    options["target"] = host.model_type
    options["base"] = "average" if base is None else sources[base].label
    options["router_prompts"] = prompts_digest or None
    return options
