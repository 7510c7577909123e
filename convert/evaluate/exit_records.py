"""What every exit of a model says of every token, from one pass; any rule is then judged from it.

With keys and values that are exact ("recompute"), what a token computes does not depend on where
others leave, so one pass through all blocks holds what every rule would do.

Shapes: N blocks, S tokens of a block, E exits in front of the last block's end, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from adaconvert.data.images import ImageBlocks
from adaconvert.errors import SourceError
from adaconvert.evaluate.risk import Floats
from adaconvert.evaluate.sweep import REFERENCE, Measured, Measurer, Setting
from adaconvert.modeling.adaptive_knobs import EXITS

if TYPE_CHECKING:
    from torch import Tensor

    from adaconvert.data.tokens import TokenBlocks
    from adaconvert.evaluate.testing_sequence import Integers

#: positions whose logits are held at once.
_AT_ONCE: Final = 256
_NEVER: Final = -2.0
#: splits whose records are kept joined.
_SPLITS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One block; a classifier has one position.

    Attributes:
        sure: float32 [S, E], `_NEVER` where an exit cannot be judged; of measure "patience" how
            alike its probabilities and those of the exit before are (F-PABEE).
        tops: int32 [S, E + 1], what each exit chooses; last, the model.
        losses: float32 [S, E + 1], of the next token; 0 where there is none.
    """

    sure: Any
    tops: Any
    losses: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The records of some blocks, one after another: T tokens of n blocks.

    Attributes:
        record: its S is T.
        places: int64 [T], position of each token in its block.
        real: int64 [P], the tokens that predict something.
        starts: int64 [n], where in `real` each block starts.
        lengths: int64 [n], tokens of each block that the model reads.
    """

    record: Record
    places: Any
    real: Any
    starts: Any
    lengths: Any

    def means(self, values: Floats) -> Floats:
        """Return the mean over each block's predicting tokens, [n], of values [P]."""
        counts = np.diff([*self.starts, len(self.real)])
        return np.asarray(np.add.reduceat(values.astype(np.float64), self.starts) / counts)


def exits_taken(
    rule: Mapping[str, Any],
    orders: Sequence[int],
    record: Record,
    places: Integers | None = None,
) -> Integers:
    """Return which exit each token takes, [S]: a column of the record, E for none.

    Args:
        rule: {"measure", "thresholds", "decay", "patience"}.
        orders: [E] which exit of the configuration each column is.
        record: of a block, or of several.
        places: [S] positions of the tokens in their blocks; 0 to S - 1 if not given.
    """
    length, count = record.sure.shape
    taken = np.full(length, count, dtype=np.int64)
    if rule["measure"] == "patience":
        same = record.tops[:, 1:count] == record.tops[:, : count - 1]
        agreed = np.zeros(length, dtype=np.int64)
        for column in range(1, count):
            level = rule["thresholds"][orders[column]]
            agrees = same[:, column - 1] if level is None else record.sure[:, column] > level
            agreed = np.where(agrees, agreed + 1, 0)
            taken[(agreed >= rule["patience"]) & (taken == count)] = column
        return taken
    fall: Any = 1.0
    if rule["decay"] is not None:
        found = np.arange(length) if places is None else places
        place = found / int(rule["decay"]["length"])
        fall = 0.9 + 0.1 * np.exp(-float(rule["decay"]["rate"]) * place)
    for column in reversed(range(count)):
        level = rule["thresholds"][orders[column]]
        if level is not None:
            sure = record.sure[:, column].astype(np.float64)
            taken[(sure > level * fall) & (sure != _NEVER)] = column
    return taken


class ExitMeasurer(Measurer):
    """Measures rules of leaving; each block is run once.

    Args:
        model: adaptive, with exits and without experts.
        blocks, options: see `Measurer`.
        measure: of confidence.
    """

    def __init__(self, model: Any, blocks: TokenBlocks, *, measure: str, **options: Any) -> None:
        super().__init__(model, blocks, **options)
        exits = model.adaptive_runtime.exits
        self.count = len(model.get_submodule(exits["blocks"]))
        places = [int(head["at"]) for head in exits["heads"]]
        self.orders = [order for order, at in enumerate(places) if at < self.count]
        self.places = [places[order] for order in self.orders]
        self._rule = measure
        self._records: dict[int, Record] = {}
        self._joins: dict[bytes, Joined] = {}
        self._costs: dict[int, tuple[float, float]] = {}
        #: with frozen states every rule needs a pass of its own
        self.frozen = exits["kv"] == "propagate" and exits["kind"] == "causal"

    def records(self, chosen: Integers) -> list[Record]:
        """Return the records of blocks; those without one are run."""
        missing = [int(block) for block in chosen if int(block) not in self._records]
        with self.model.set_exits(None):
            for start in range(0, len(missing), self._batch):
                self._record(np.array(missing[start : start + self._batch]))
        return [self._records[int(block)] for block in chosen]

    def forget(self) -> None:
        """Drop what was recorded."""
        self._records.clear()
        self._joins.clear()

    def reference(self, chosen: Integers) -> Measured:
        """Return what the whole model does on the blocks `chosen`.

        Raises:
            SourceError: its loss is not finite.
        """
        if self.frozen:
            return super().reference(chosen)
        joined = self._joined(chosen)
        tops, losses = joined.record.tops[:, -1:], joined.record.losses[joined.real, -1]
        loss = joined.means(losses)
        self._check(REFERENCE, chosen, loss)
        return Measured(
            loss=loss,
            changed=np.zeros(len(chosen)),
            compute=1.0,
            wrong=self._wrong(chosen, tops) if self._classifies else None,
        )

    def measure(self, setting: Setting, chosen: Integers) -> Measured:
        """Return what a setting does on the blocks `chosen`."""
        rule = setting.select.get(EXITS)
        if self.frozen:
            return super().measure(setting, chosen)
        if rule is None:
            return self.reference(chosen)
        joined = self._joined(chosen)
        record = joined.record
        column = exits_taken(rule, self.orders, record, joined.places)
        rows, taken = joined.real, column[joined.real]
        self.shown.update(len(chosen))
        # all tokens of a text that is classified leave together
        weights = joined.lengths if self._classifies else None
        each = np.bincount(column, weights=weights, minlength=len(self.places) + 1)
        chosen_now = record.tops[np.arange(len(column)), column][:, None]
        return Measured(
            loss=joined.means(record.losses[rows, taken]),
            changed=joined.means(record.tops[rows, taken] != record.tops[rows, -1]),
            compute=self._compute(rule, each.astype(np.float64)),
            wrong=self._wrong(chosen, chosen_now) if self._classifies else None,
        )

    def _joined(self, chosen: Integers) -> Joined:
        """Return the records of blocks in one; those asked for last are kept."""
        key = chosen.tobytes()
        if key not in self._joins:
            records = self.records(chosen)
            sizes = [len(record.tops) for record in records]
            real = [
                np.append(self._real[block, :size], [False] * size)[:size]
                for block, size in zip(chosen, sizes, strict=True)
            ]
            counts = np.array([one.sum() for one in real])
            while len(self._joins) >= _SPLITS:
                self._joins.pop(next(iter(self._joins)))
            self._joins[key] = Joined(
                record=Record(
                    sure=np.concatenate([record.sure for record in records]),
                    tops=np.concatenate([record.tops for record in records]),
                    losses=np.concatenate([record.losses for record in records]),
                ),
                places=np.concatenate([np.arange(size) for size in sizes]),
                real=np.flatnonzero(np.concatenate(real)),
                starts=np.cumsum(counts) - counts,
                lengths=self.blocks.weights[chosen].sum(axis=1),
            )
        return self._joins[key]

    def _compute(self, rule: Mapping[str, Any], counts: Floats) -> float:
        """Return the account's fraction of the reference's FLOPs.

        Args:
            rule: of leaving.
            counts: [E + 1] tokens that take each exit.
        """
        ends = [*self.places, self.count]
        whole = self.model.config.adaptive["reference"]["flops_per_token"]
        change = -sum(
            float(number) * self._flops(end)[0]
            for number, end in zip(counts, ends, strict=True)
            if number
        )
        for at in self._looked(rule):
            here = sum(number for number, end in zip(counts, ends, strict=True) if end >= at)
            change += float(here) * self._flops(at)[1]
        return float((whole + change / counts.sum()) / whole)

    def _flops(self, at: int) -> tuple[float, float]:
        """Return the reference's FLOPs that a token saves which leaves at an exit, and what looking
        at the exit costs it."""
        import torch

        from adaconvert.modeling.adaptive_context import Account
        from adaconvert.modeling.adaptive_exit_costs import count_left

        if at not in self._costs:
            reference = self.model.config.adaptive["reference"]
            found = Account(static_flops=0, static_bytes=0, reference=reference)
            looked = [at] if at < self.count else []
            one = torch.ones(1, dtype=torch.int64)
            inside = self.model._own_modules()
            count_left(self.model, found, at * one, one, looked, inside=inside)
            self._costs[at] = float(found.skipped_reference), float(found.exit_flops)
        return self._costs[at]

    def _looked(self, rule: Mapping[str, Any]) -> list[int]:
        """Return the exits the runtime looks at under a rule."""
        if rule["measure"] == "patience":
            return self.places
        used = [c for c, order in enumerate(self.orders) if rule["thresholds"][order] is not None]
        if rule["measure"] == "state" and used:
            return self.places[: used[-1] + 1]
        return [self.places[column] for column in used]

    def _record(self, part: Integers) -> None:
        import torch

        device = next(self.model.parameters()).device
        weights = self.blocks.weights[part]
        longest = int(weights.sum(axis=1).max())
        ids = torch.from_numpy(self.blocks.ids[part, :longest]).to(device)
        mask = torch.from_numpy(weights[:, :longest]).to(device)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
        if isinstance(self.blocks, ImageBlocks):
            given = {"pixel_values": self.blocks.pixels(part).to(device)}
        with torch.inference_mode():
            states = self.model.exit_states(self.places, **given)
            if self._classifies:
                labels = None if self._labels is None else torch.from_numpy(self._labels[part])
                found = self._texts(states, given, labels)
            else:
                found = self._tokens(states, ids)
        sure, tops, losses = (one.cpu().numpy() for one in found)
        self._check_exits(losses[mask.cpu().numpy() > 0] if not self._classifies else losses)
        for row, block in enumerate(part):
            length = 1 if self._classifies else int(weights[row].sum())
            self._records[int(block)] = Record(
                sure=sure[row, :length].astype(np.float32),
                tops=tops[row, :length].astype(np.int32),
                losses=losses[row, :length].astype(np.float32),
            )

    def _check_exits(self, losses: Floats) -> None:
        """Refuse exits whose heads are at fault; what the whole model computes is looked at
        elsewhere.

        Args:
            losses: [..., E + 1].

        Raises:
            SourceError: one of an exit is not finite.
        """
        every = losses.reshape(-1, losses.shape[-1])
        bad = ~np.isfinite(every[:, :-1]) & np.isfinite(every[:, -1:])
        if bad.any():
            column = int(bad.any(axis=0).argmax())
            at, found = self.places[column], every[bad[:, column], column][0]
            raise SourceError(
                f"the exit after {at} blocks computes "
                f"{'NaN' if np.isnan(found) else 'an infinite loss'}, and the whole model does not",
                where=f"tensors exits.{at}",
                hint="The weights of its head or their dtype are at fault: look at them with "
                "`adaconvert inspect`, or try --dtype float32.",
            )

    def _tokens(self, states: Mapping[int, Tensor], ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return confidence [B, S, E], choices and losses [B, S, E + 1], a few logits at a time."""
        import torch

        after = torch.cat([ids[:, 1:], ids[:, :1]], 1)
        step = max(1, _AT_ONCE // len(ids))
        parts = [
            self._judged(
                {at: state[:, start : start + step] for at, state in states.items()},
                after[:, start : start + step],
            )
            for start in range(0, ids.shape[1], step)
        ]
        sure, tops, losses = (torch.cat(one, 1) for one in zip(*parts, strict=True))
        # after the last token comes none
        losses[:, -1] = 0
        return sure, tops, losses

    def _judged(
        self, states: Mapping[int, Tensor], after: Tensor | None, **given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of some positions; losses are of `after`, [B, S], of a classifier [B, 1],
        or None for the class the model chooses."""
        import torch

        logits = {at: self.model.exit_logits(at, state, **given) for at, state in states.items()}
        if self._classifies:
            logits = {at: scores[:, None] for at, scores in logits.items()}
            states = {at: state[:, :1] for at, state in states.items()}
        if after is None:
            after = logits[self.count].argmax(-1)
        every = [logits[at] for at in (*self.places, self.count)]
        tops = torch.stack([scores.argmax(-1) for scores in every], -1)
        losses = [-_chosen(scores, after) for scores in every]
        sure = [self._sure(column, logits, states) for column in range(len(self.places))]
        return torch.stack(sure, -1), tops, torch.stack(losses, -1)

    def _texts(
        self, states: Mapping[int, Tensor], given: Mapping[str, Any], labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        after = None if labels is None else labels.to(states[self.count].device)[:, None]
        return self._judged(states, after, **{k: v for k, v in given.items() if k != "input_ids"})

    def _sure(
        self, column: int, logits: Mapping[int, Tensor], states: Mapping[int, Tensor]
    ) -> Tensor:
        """Return how sure an exit is of each position, [B, S]."""
        from adaconvert.modeling.adaptive_exit_decide import confidence, similarity

        at = self.places[column]
        if column == 0 and self._rule in ("state", "patience"):
            return logits[at].new_full(logits[at].shape[:2], _NEVER).float()
        if self._rule == "patience":
            return similarity(logits[at], logits[self.places[column - 1]]).float()
        return confidence(
            self._rule,
            logits[at],
            state=states[at],
            previous_state=states[self.places[column - 1]] if column else None,
            head=self.model.adaptive_exits()[at],
        )


def _chosen(scores: Tensor, after: Tensor) -> Tensor:
    """Return the log-probability of one class at each position, [B, S]."""
    logs = scores.float().log_softmax(-1)
    return logs.gather(-1, after[..., None])[..., 0]


def pooled(records: Sequence[Record], column: int | None = None) -> Floats:
    """Return how sure the exits are of tokens, sorted; of one exit, or of each token's surest."""
    each = [r.sure.max(axis=1) if column is None else r.sure[:, column] for r in records]
    every = np.concatenate(each).astype(np.float64)
    return np.sort(every[every > _NEVER])
