"""What a family file says: config keys with their defaults, tensor templates, traits, conditions.

Only data types. `values` reads a config.json through them and `interpret` turns the result into a
ModelSpec. Sizes and conditions are written in the language of `expressions`, over the left-hand
names of `Family.keys` and `Family.masks`, plus `layer`, `ordinal` (layer + 1), `windowed`,
`always`, `never` and the flags of the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of config.json.

    Attributes:
        name: the key as transformers writes it; empty for a size that is always the `fallback`.
        kind: "size" (whole, >= 1), "count" (whole, >= 0), "flag", "number", "text", "list" (of
            whole numbers), "labels" (the length of a mapping) or "side" (a whole number, or the
            same one twice).
        default: what transformers assumes when the key is absent.
        nullable: null is a value of its own (no window, no clip).
        fallback: expression for a key that is null, or absent without a default.
        aliases: other spellings transformers accepts.
        dead: value that means the same as null (a window of 0).
        renamed: older name of a value -> today's.
    """

    name: str
    kind: str = "size"
    default: object = None
    nullable: bool = False
    fallback: str = ""
    aliases: tuple[str, ...] = ()
    dead: int | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Tensors of one role, one per layer and expert where `name` holds {layer} and {expert}.

    Attributes:
        role: see `base`.
        name: name on disk; {p} stands for the family's prefix.
        shape: comma-separated expressions.
        when: condition under which the tensor exists.
        optional: condition under which it may be absent.
        transposed: stored [in, out].
    """

    role: str
    name: str
    shape: str
    when: str = ""
    optional: str = "never"
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """A yes or no per layer.

    Attributes:
        default: condition that decides when the config lists nothing.
        key: config key of a list with one entry per layer.
        value: entry that means yes.
        others: entries that mean no.
        exact: the list has one entry per layer; else at least one.
    """

    default: str
    key: str = ""
    value: object = None
    others: tuple[object, ...] = ()
    exact: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """A trait read off the config: the value of an expression."""

    expression: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """A trait read off the config: an expression to a power; 1 where `when` is false."""

    base: str
    exponent: float
    when: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A trait with one of two values, by a condition."""

    when: str
    then: object
    otherwise: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """How a family rotates positions, and where its config says so.

    Attributes:
        theta: base assumed when the config states none.
        theta_key: top-level key of the base in configs of transformers 4.
        partial: rotated fraction assumed when none is stated; None when the family ignores the key.
        partial_key: top-level key of the fraction in configs of transformers 4.
        layered: parameters are kept per layer type (Gemma-3, OLMo-3); rope_scaling then concerns
            the layers with full attention only.
        local_theta: base of the sliding layers of a layered family.
        local_key: top-level key of that base in configs of transformers 4; empty for none.
        renamed: older name of a rope type -> today's.
    """

    theta: float = 10000.0
    theta_key: str = "rope_theta"
    partial: float | None = None
    partial_key: str = "partial_rotary_factor"
    layered: bool = False
    local_theta: float = 10000.0
    local_key: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where the feed-forward module of a block lies, for families whose files say it otherwise.

    Attributes:
        path: of the module in memory; {p} stands for the family's prefix.
        stored: what a tensor of that module is called by on disk.
        children: role -> child module that holds the matrix.
        attention: role of a projection -> its path in memory.
    """

    path: str
    stored: str
    children: Mapping[str, str]
    attention: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How the sparse blocks of a family choose experts and weigh them: a softmax of logits W x.

    Attributes:
        path: of a block's module in memory.
        stored: what names of tensors of that module begin with on disk; empty when it is `path`.
        router, experts: child modules in memory.
        renormalised: condition under which the weights of the chosen experts sum to 1; else they
            are those of the softmax over all experts.
        scaling: expression of the factor on every weight; empty for 1.
        float32: logits are computed in float32, whatever the dtype of the model.
        unlike: what scores are where they are something else than this softmax; empty where not.
        method: our name of the key that says "greedy" where the best k are taken of all experts;
            empty where they always are.
    """

    path: str = "model.layers.{layer}.mlp"
    stored: str = ""
    router: str = "gate"
    experts: str = "experts"
    renormalised: str = "always"
    scaling: str = ""
    float32: bool = False
    unlike: str = ""
    method: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family, as data.

    Attributes:
        model_type: key in config.json.
        stem: what the names of its transformers classes begin with.
        site: where its feed-forward modules lie; None where the names of `up` say it.
        order: roles of a block's linears in the order of the modules in memory; empty when that of
            its tensors is the same.
        routing: how its sparse blocks choose experts; None for a dense family.
        kind: "decoder", "encoder" or "vision".
        architectures: supported class -> flags it sets; the first is assumed when none is named.
        keys: our name -> config key. Every family has hidden, layers and heads.
        tensors: templates in the order of the checkpoint; those with {layer} must be adjacent.
        traits: fields of `base.Traits`, constant or Ref, Power, Choice; `tied`, `rope` and
            `sliding` are derived.
        masks: conditions per layer; "sliding", "roped" and "moe" have a meaning of their own.
        rope: None without rotary positions.
        window: condition under which the key `window` is in force; empty for a family without one.
        prefix: what {p} stands for when the architecture has the flag "prefixed".
        bare: files of the same architecture without the prefix exist (GPT-2 on the hub).
        checks: expressions that must come out even, besides those in the templates.
        refusals: condition -> why such a config is not supported.
        legacy: regular expression -> why such a stored tensor is no part of the model.
        renamed: older ending of a tensor name -> today's.
    """

    model_type: str
    stem: str
    architectures: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, Key]
    tensors: tuple[Template, ...]
    kind: str = "decoder"
    traits: Mapping[str, object] = field(default_factory=dict)
    masks: Mapping[str, Mask] = field(default_factory=dict)
    rope: Rope | None = None
    window: str = ""
    prefix: str = ""
    bare: bool = False
    checks: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    legacy: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    site: Site | None = None
    routing: Routing | None = None
    order: tuple[str, ...] = ()
