"""What a fine-tune needs in memory, before anything is loaded; bytes throughout.

Weights, gradients and optimiser state are counted on a model without numbers (torch's meta device)
that went through the same preparation as the one that is trained, so they are exact. What a forward
pass keeps for the backward one is counted by running that model, and is an estimate.

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adaconvert.arch.exits import CAUSAL
from adaconvert.layerwise.names import block_of
from adaconvert.train.adapt import without_stacked
from adaconvert.train.adapt_quantised import packed_bytes
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.exit_heads import OwnHeads
from adaconvert.train.goals import goals_of
from adaconvert.train.memory_outline import kept_by_block
from adaconvert.train.parts import Chosen, part_of, plain_name, sites_of
from adaconvert.train.prepare import prepare
from adaconvert.units import human_bytes

#: copies of the logits that exist at the worst moment: as computed, in float32, their logarithm
#: and its gradient.
_LOGIT_COPIES = 4
_COLUMNS = ("router", "experts", "adapters", "exits", "rest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes one process needs where it trains.

    Attributes:
        weights, gradients, optimizer: by part of the model.
        copies: trained weights rounded for bfloat16 products, gradients on their way to other
            processes, and one block gathered from them.
        activations: what the forward pass keeps, and the logits.
        teacher: of the distillation.
        chosen: what is trained.
    """

    weights: Mapping[str, int]
    gradients: Mapping[str, int]
    optimizer: Mapping[str, int]
    copies: int = 0
    activations: int = 0
    teacher: int = 0
    chosen: Chosen | None = field(default=None, repr=False)

    @property
    def total(self) -> int:
        """Return the sum."""
        parts = (self.weights, self.gradients, self.optimizer)
        return (
            sum(sum(part.values()) for part in parts)
            + self.copies
            + self.activations
            + self.teacher
        )

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {
            "weights": dict(self.weights),
            "gradients": dict(self.gradients),
            "optimizer": dict(self.optimizer),
            "copies": self.copies,
            "activations": self.activations,
            "teacher": self.teacher,
            "total": self.total,
        }

    def lines(self) -> list[str]:
        """Return the figures as a table, one row a line."""
        columns = [name for name in _COLUMNS if self.weights.get(name)]
        rows: list[list[str]] = [["memory", *columns, "total"]]
        for name in ("weights", "gradients", "optimizer"):
            part: Mapping[str, int] = getattr(self, name)
            cells = [human_bytes(part[c]) if part.get(c) else "-" for c in columns]
            rows.append([name, *cells, human_bytes(sum(part.values()))])
        for name in ("copies", "activations", "teacher"):
            if getattr(self, name):
                rows.append([name, *[""] * len(columns), human_bytes(getattr(self, name))])
        rows.append(["needed", *[""] * len(columns), human_bytes(self.total)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return [_aligned(row, widths) for row in rows]


def _aligned(row: list[str], widths: list[int]) -> str:
    first = row[0].ljust(max(widths[0], 11))
    return "  ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])


def need_of(model: Any, config: FinetuneConfig, *, teacher: int = 0) -> Need:
    """Return what one process needs to train.

    Args:
        model: as loaded, on the meta device; spent afterwards.
        config: the fine-tune.
        teacher: bytes of another model that is held.

    Raises:
        OptionError: an option does not fit the model.
    """
    matrices = {name: p.numel() for name, p in model.named_parameters()}
    prepared = prepare(model, config)
    packed = {name: matrices[name] for name in prepared.packed}
    need = _static(model, config, packed, prepared.chosen)
    # before the model is run in another dtype
    logits = _logits(model, config)
    kept = _kept(model, config, packed)
    return replace(
        need,
        teacher=teacher,
        copies=_copies(model, config),
        activations=kept + logits,
    )


def _static(model: Any, config: FinetuneConfig, packed: Mapping[str, int], chosen: Chosen) -> Need:
    sites = sites_of(model)
    weights: dict[str, int] = {}
    gradients: dict[str, int] = {}
    states: dict[str, int] = {}

    def add(kind: dict[str, int], part: str, count: int) -> None:
        kind[part] = kind.get(part, 0) + count

    spread = config.processes if spreads(config) else 1
    for name, parameter in model.named_parameters():
        part = part_of(plain_name(name), sites)
        size = parameter.numel() * parameter.element_size()
        stored = packed_bytes(packed[plain_name(name)]) if plain_name(name) in packed else size
        add(weights, part, -(-stored // spread))
        if parameter.requires_grad:
            add(gradients, part, -(-size // spread))
            add(states, part, _state_bytes(-(-size // spread), config))
    for name, buffer in model.named_buffers():
        add(weights, part_of(name, sites), buffer.numel() * buffer.element_size())
    return Need(weights=weights, gradients=gradients, optimizer=states, chosen=chosen)


def _state_bytes(size: int, config: FinetuneConfig) -> int:
    """Return the optimiser's bytes for a parameter: two moments and a float32 step, or nothing."""
    return 2 * size + 4 if config.optimizer == "adamw" else 0


def _copies(model: Any, config: FinetuneConfig) -> int:
    total = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        if config.precision == "bf16" and parameter.requires_grad and parameter.dim() > 1:
            total += size // 2
        if config.processes > 1 and parameter.requires_grad and not spreads(config):
            total += size
    return total + (max(_by_block(model).values(), default=0) if spreads(config) else 0)


def spreads(config: FinetuneConfig) -> bool:
    """Return whether each process holds a part of what is trained."""
    return config.machine.sharded or config.machine.experts_over > 1


def _by_block(model: Any) -> dict[int | None, int]:
    found: dict[int | None, int] = {}
    for name, parameter in model.named_parameters():
        block = block_of(name)
        found[block] = found.get(block, 0) + parameter.numel() * parameter.element_size()
    return found


def _itemsize(config: FinetuneConfig) -> int:
    return {"bf16": 2, "fp64": 8}.get(config.precision, 4)


def _logits(model: Any, config: FinetuneConfig) -> int:
    tokens = config.batch_size * config.seq_len
    copies = _LOGIT_COPIES * (2 if config.distill else 1)
    rest = 0
    if _learns_exits(model, config):
        # the end and every exit, one after the other, a chunk of positions at a time; what exits
        # learn from stays beside them, and so do sums of the gradients of heads
        tokens = min(tokens, config.exits.chunk)
        copies += config.exits.loss != "ce"
        rest = _tails(model) * (2 if config.accumulate > 1 else 1)
    return tokens * int(model.config.vocab_size) * max(_itemsize(config), 4) * copies + rest


def _learns_exits(model: Any, config: FinetuneConfig) -> bool:
    """Return whether losses are those of exits of a language model, see `exit_losses`."""
    if config.exits.skips:
        return True
    exits = getattr(getattr(model, "adaptive_runtime", None), "exits", None)
    return exits is not None and exits["kind"] == CAUSAL and not config.exits.is_off


def _tails(model: Any) -> int:
    """Return the bytes of what lies between states and logits and is trained."""
    if getattr(getattr(model, "adaptive_runtime", None), "exits", None) is not None:
        tail = OwnHeads(model).tail()
    else:
        head = model.get_output_embeddings()
        tail = [] if head is None else [p for p in head.parameters() if p.requires_grad]
    return sum(parameter.numel() * parameter.element_size() for parameter in tail)


def _kept(model: Any, config: FinetuneConfig, packed: Mapping[str, int]) -> int:
    """Return what the blocks keep for the backward pass."""
    # experts with adapters are kept as the sum of both, packed ones as what they are unpacked to;
    # other matrices are not kept
    stacked = dict(without_stacked(model)) if config.adapting.rank else {}
    stacked |= {name: count for name, count in packed.items() if not name.endswith(".weight")}
    unpacked: dict[int | None, int] = {}
    for name, count in stacked.items():
        place = block_of(name)
        unpacked[place] = unpacked.get(place, 0) + count * _itemsize(config)
    _run_the_budget(model, config)
    state = config.batch_size * config.seq_len * _hidden(model) * max(_itemsize(config), 4)
    kept = kept_by_block(
        model, (config.batch_size, config.seq_len), scale=_itemsize(config) / 2
    ) or _formula(model, config)
    inside = {place: size for place, size in kept.items() if place is not None}
    for place, size in unpacked.items():
        inside[place or 0] = inside.get(place or 0, 0) + size
    outside = kept.get(None, 0)
    if not config.checkpointing:
        return outside + sum(inside.values())
    # one state per block, and the inside of one block at a time
    return outside + len(inside) * state + max(inside.values(), default=0)


def _run_the_budget(model: Any, config: FinetuneConfig) -> None:
    """Let blocks with null experts that have a budget run as many real ones as they will at most on
    average: what they start with, those of the model without null ones, or more.

    Without numbers each of their slots would run one.
    """
    for path, share in goals_of(getattr(model.config, "adaptive", None), config).items():
        top_k = model.adaptive_sites()[path].adaptive_spec["mixture"]["top_k"]
        model.set_select("top-k", sites=[path], k=math.ceil(max(share, 1.0) * top_k))


def _hidden(model: Any) -> int:
    config = model.config
    names = [name for name in ("hidden_size", "n_embd") if hasattr(config, name)]
    return int(getattr(config, names[0])) if names else 0


def _formula(model: Any, config: FinetuneConfig) -> dict[int | None, int]:
    """Return about what each block keeps: what goes into and comes out of every matrix."""
    tokens = config.batch_size * config.seq_len
    chosen = getattr(model.config, "num_experts_per_tok", None) or 1
    found: dict[int | None, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or block_of(name) is None:
            continue
        uses = chosen if parameter.dim() == 3 else 1
        size = tokens * uses * sum(parameter.shape[-2:]) * _itemsize(config) * 3 // 2
        found[block_of(name)] = found.get(block_of(name), 0) + size
    return found
