"""What each setting of a model's knobs costs and does, block by block.

A setting is a selection per site, in the form `config.adaptive.calibration` stores. Settings are
made for *shares* of the experts a token runs on average; the value of a rule that reaches a share
is read off the router's scores on data that only serve for this.

Shapes: N blocks, L tokens of a block, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from adaconvert.data.images import ImageBlocks
from adaconvert.errors import OptionError, SourceError
from adaconvert.evaluate.applied import applied
from adaconvert.evaluate.block_losses import hidden_losses, token_losses
from adaconvert.evaluate.loaded import is_classifier
from adaconvert.evaluate.risk import Floats
from adaconvert.evaluate.settings import RULES
from adaconvert.progress import Bar, Silent

if TYPE_CHECKING:
    from torch import Tensor

    from adaconvert.data.tokens import TokenBlocks
    from adaconvert.evaluate.masking import Hidden
    from adaconvert.evaluate.testing_sequence import Integers

#: site path, or "*" for every other site -> {"rule": ..., and its value}.
Select = dict[str, dict[str, Any]]
#: rule -> the name of its value.
KNOB: Final = {rule: name for rule, name in RULES.items() if name is not None}
ALL: Final[Select] = {"*": {"rule": "all"}}
#: numbers of one batch of logits; 512 MiB of float32.
_LOGITS: Final = 1 << 27
#: scores kept of a site, and tokens run to get them.
_SCORES: Final = 1 << 20
_SCORE_TOKENS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One position of the knobs.

    Attributes:
        rule: the selection rule, "all" for the reference.
        name: what a person calls it.
        select: per site, as stored.
        share: share of the experts it was made for, None when its value was given.
    """

    rule: str
    name: str
    select: Select
    share: float | None = None


REFERENCE: Final = Setting(rule="all", name="all experts", select=ALL, share=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One setting on some blocks, in the order they were asked for.

    Attributes:
        loss: [n] mean loss of each block, nats per prediction.
        changed: [n] share of each block's predictions that differ from the reference's.
        compute: routed FLOPs per token as a fraction of the reference's.
        wrong: [n] 1 where the class is not the label, else 0; None where labels are not known.
    """

    loss: Floats
    changed: Floats
    compute: float
    wrong: Floats | None = None


class Measurer:
    """Runs a model on blocks; what the reference did is remembered.

    A causal language model predicts each next token, a masked one those that are hidden. A
    classifier makes one prediction of a text or an image; its loss is that of the label, or without
    labels of the class the reference chooses.

    Args:
        model: an adaptive model of one of these kinds, in evaluation mode.
        blocks: what it is run on.
        batch: blocks at a time, None for as many as 512 MiB of logits allow.
        names: where each document comes from, for errors.
        hidden: what is hidden from a masked language model, None for any other.
        labels: [documents] the class of each, None where they are not known.

    Attributes:
        predicted: [N] predictions about each block.
        shown: told of every block that a setting other than the reference has been run on.
    """

    def __init__(
        self,
        model: Any,
        blocks: TokenBlocks,
        *,
        batch: int | None = None,
        names: Sequence[str] = (),
        hidden: Hidden | None = None,
        labels: Integers | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self._names = names
        self.shown: Bar = Silent()
        self._hidden = hidden
        #: [N] the class of each block
        self._labels = None if labels is None else labels[blocks.document]
        self._classifies = is_classifier(type(model).__name__)
        config = model.config.get_text_config()
        room = _LOGITS // (int(getattr(config, "vocab_size", 1) or 1) * blocks.length)
        if self._classifies:
            # decoders find the token they classify at by the padding after it
            alone = getattr(config, "pad_token_id", None) is None
            room = 1 if alone and not isinstance(blocks, ImageBlocks) else 16
        self._batch = batch or max(1, room)
        self._real = np.ones((len(blocks), 1), dtype=bool)
        if not self._classifies:
            self._real = blocks.weights[:, 1:] if hidden is None else hidden.places
        self.predicted: Integers = self._real.sum(axis=1).astype(np.int64)
        self._reference_loss = np.full(len(blocks), np.nan)
        self._reference_top = np.full(blocks.ids.shape, -1, dtype=np.int32)

    def reference(self, chosen: Integers) -> Measured:
        """Return what the reference does on the blocks `chosen`.

        Raises:
            SourceError: its loss is not finite.
        """
        missing = chosen[np.isnan(self._reference_loss[chosen])]
        with applied(self.model, ALL):
            for part, losses, tops in self.passes(missing):
                self._check(REFERENCE, part, losses)
                self._reference_loss[part] = losses
                self._reference_top[part, : tops.shape[1]] = tops
        loss, wrong = self._reference_loss[chosen], self._wrong(chosen, self._reference_top[chosen])
        return Measured(loss=loss, changed=np.zeros(len(chosen)), compute=1.0, wrong=wrong)

    def measure(self, setting: Setting, chosen: Integers) -> Measured:
        """Return what a setting does on the blocks `chosen`.

        Raises:
            SourceError: its loss is not finite.
        """
        self.reference(chosen)
        if setting.select == ALL:
            return self.reference(chosen)
        loss, changed = np.empty(len(chosen)), np.empty(len(chosen))
        wrong = None if self._labels is None else np.empty(len(chosen))
        done = 0
        with applied(self.model, setting.select), self.model.account() as account:
            for part, losses, tops in self.passes(chosen):
                self._check(setting, part, losses)
                here = slice(done, done + len(part))
                width = tops.shape[1]
                differs = (tops != self._reference_top[part, :width]) & self._real[part, :width]
                loss[here] = losses
                changed[here] = differs.sum(axis=1) / self.predicted[part]
                if wrong is not None:
                    wrong[here] = self._wrong(part, tops)
                done += len(part)
                self.shown.update(len(part))
        compute = float(account.compute())
        return Measured(loss=loss, changed=changed, compute=compute, wrong=wrong)

    def scores(self, chosen: Integers, *, seed: int = 0, select: Select = ALL) -> dict[str, Floats]:
        """Return a sample of the router's scores at each site, [T', E], on some of the blocks, as
        they are at a setting; no site where no token came by."""
        rng = np.random.default_rng(seed)
        kept: dict[str, list[Any]] = {}
        tokens = np.cumsum(self.blocks.weights[chosen].sum(axis=1))
        chosen = chosen[: int(np.searchsorted(tokens, _SCORE_TOKENS)) + 1]
        total = int(tokens[len(chosen) - 1])
        with applied(self.model, select), self.model.collect("router_scores") as got:
            # one block at a time: with single neurons as experts its scores are as large as its
            # hidden states in every layer together.
            for _ in self.passes(chosen, batch=1):
                for path, found in got.items():
                    if found:
                        kept.setdefault(path, []).append(_sample(found, total, rng))
                    found.clear()
        return {path: np.concatenate(parts) for path, parts in kept.items()}

    def passes(
        self, chosen: Integers, batch: int | None = None
    ) -> Iterator[tuple[Integers, Floats, Any]]:
        """Yield blocks, their mean losses [n] and top predictions [n, S - 1, S or 1], by batch."""
        import torch

        device = next(self.model.parameters()).device
        step = batch or self._batch
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            weights = self.blocks.weights[part]
            longest = int(weights.sum(axis=1).max())
            ids = torch.from_numpy(self.blocks.ids[part, :longest]).to(device)
            mask = torch.from_numpy(weights[:, :longest]).to(device)
            own = {} if self._classifies or self._hidden else {"use_cache": False}
            fed, hides = ids, self._hidden
            if hides is not None:
                places = torch.from_numpy(hides.places[part, :longest]).to(device)
                fed = ids.masked_fill(places, hides.token)
            given = {"input_ids": fed, "attention_mask": mask.long(), **own}
            if isinstance(self.blocks, ImageBlocks):
                given = {"pixel_values": self.blocks.pixels(part).to(device)}
            with torch.inference_mode():
                logits = self.model(**given).logits
                if hides is not None:
                    pairs = [hidden_losses(logits[i], ids[i], places[i]) for i in range(len(part))]
                elif self._classifies:
                    pairs = [self._class(logits[i], block) for i, block in enumerate(part)]
                else:
                    pairs = [token_losses(logits[i], ids[i], mask[i]) for i in range(len(part))]
            tops = torch.stack([top for _, top in pairs]).cpu().numpy()
            yield part, np.array([loss for loss, _ in pairs]), tops

    def _class(self, logits: Tensor, block: int) -> tuple[float, Tensor]:
        """Return the loss of the label, or of the class the reference chose, and the class chosen
        now, [1]."""
        scores = logits.double().log_softmax(dim=-1)
        top = scores.argmax(dim=-1, keepdim=True).int()
        labels = self._reference_top[:, 0] if self._labels is None else self._labels
        known = int(labels[block])
        return -float(scores[known if known >= 0 else int(top)]), top

    def _wrong(self, chosen: Integers, tops: Any) -> Floats | None:
        """Return 1 where a classifier does not choose the label, else 0, [n]."""
        if self._labels is None:
            return None
        return np.asarray(tops[:, 0] != self._labels[chosen], dtype=np.float64)

    def _check(self, setting: Setting, part: Integers, losses: Floats) -> None:
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            document = int(self.blocks.document[part[bad[0]]])
            name = self._names[document] if self._names else f"document {document}"
            raise SourceError(
                f"the model's loss is {losses[bad[0]]} with {setting.name}",
                where="calibration",
                found=f"first in {name}",
                hint="Nothing was written. Check the weights with `adaconvert inspect`, or "
                "calibrate in --dtype float32.",
            )


def _sample(found: Sequence[Tensor], total: int, rng: np.random.Generator) -> Any:
    import torch

    scores = torch.cat(list(found)).float().cpu().numpy()
    room = max(1, int(_SCORES / scores.shape[1] * len(scores) / max(total, 1)))
    if len(scores) > room:
        scores = scores[rng.choice(len(scores), room, replace=False)]
    return scores


class Grid:
    """Makes settings of a model from the scores of its routers.

    Args:
        experts: site path -> number of routed experts.
        scores: site path -> [T, E].
    """

    def __init__(self, experts: Mapping[str, int], scores: Mapping[str, Floats]) -> None:
        self.experts = dict(experts)
        self._scores = scores
        self._sorted: dict[tuple[str, str], Floats] = {}

    def part(self, paths: Collection[str]) -> Grid:
        """Return what makes settings of some of the sites."""
        return Grid({path: self.experts[path] for path in paths}, self._scores)

    def uniform(self, rule: str, share: float) -> Setting:
        """Return the setting in which every site runs this share of its experts.

        A threshold is absolute, so each site gets its own; the other rules compare the scores of
        one token with each other and share one value.
        """
        if rule in {"threshold", "top-k"}:
            name = f"{rule}, {share:.0%} of the experts"
            return self.per_site(rule, dict.fromkeys(self.experts, share), name=name, share=share)
        pooled = np.concatenate([self._statistic(rule, path) for path in self.experts])
        value = _value(rule, np.sort(pooled), share)
        return Setting(
            rule=rule,
            name=f"{rule}, {KNOB[rule]} {value:.4g}",
            share=share,
            select={"*": {"rule": rule, KNOB[rule]: value}},
        )

    def per_site(
        self, rule: str, shares: Mapping[str, float], *, name: str, share: float | None = None
    ) -> Setting:
        """Return the setting in which each site runs its own share of its experts."""
        if rule == "top-k":
            counts = {path: _count(shares[path], n) for path, n in self.experts.items()}
            return Setting(rule=rule, name=name, share=share, select=of_counts(counts))
        select: Select = {}
        for path in self.experts:
            if shares[path] >= 1:
                select[path] = {"rule": "all"}
                continue
            if (rule, path) not in self._sorted:
                self._sorted[rule, path] = np.sort(self._statistic(rule, path))
            value = _value(rule, self._sorted[rule, path], shares[path])
            select[path] = {"rule": rule, KNOB[rule]: value}
        return Setting(rule=rule, name=name, share=share, select=select)

    def shares(self, setting: Setting) -> dict[str, float]:
        """Return the share of its experts each site runs where all have one value to compare with
        their scores."""
        rule = setting.rule
        value = setting.select["*"][KNOB[rule]]
        found = {path: self._statistic(rule, path) for path in self.experts}
        chosen = {p: one < value if rule == "top-p" else one >= value for p, one in found.items()}
        return {path: float(one.mean()) for path, one in chosen.items()}

    def _statistic(self, rule: str, path: str) -> Floats:
        """Return what the rule compares with its value, for every token and expert of a site."""
        scores = np.asarray(self._scores[path], dtype=np.float32)
        if rule == "dynamic-k":
            best = np.maximum(scores.max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
            return np.asarray((scores / best).ravel())
        if rule == "top-p":
            ordered = -np.sort(-scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-30))
            return np.asarray((np.cumsum(ordered, axis=1) - ordered).ravel())
        return np.asarray(scores.ravel())


def given(rule: str, value: float) -> Setting:
    """Return the setting of one value for all sites.

    Raises:
        OptionError: the value means nothing; a tau above 1 would select nothing.
    """
    where = f"--values {value:g}"
    if rule not in KNOB:
        raise OptionError(
            "is no rule with a value", where=f"--rule {rule}", expected=", ".join(KNOB)
        )
    if rule == "top-k" and (value < 1 or value != int(value)):
        raise OptionError("at least one expert runs", where=where, expected="1, 2, 3, ...")
    if rule in {"dynamic-k", "top-p"} and not 0 <= value <= 1:
        knob = KNOB[rule]
        raise OptionError(
            f"is out of range for {rule}: {knob} above 1 would select "
            f"{'nothing' if knob == 'tau' else 'more than all'}",
            where=where,
            expected=f"{knob} from 0 to 1",
        )
    if not np.isfinite(value):
        raise OptionError("is no number", where=where)
    knob = KNOB[rule]
    number: float = int(value) if rule == "top-k" else float(value)
    return Setting(
        rule=rule, name=f"{rule}, {knob} {number:g}", select={"*": {"rule": rule, knob: number}}
    )


def _count(share: float, total: int) -> int:
    return min(total, max(1, round(share * total)))


def of_counts(counts: Mapping[str, int]) -> Select:
    """Return the selection of so many experts at each site."""
    if len(set(counts.values())) == 1:
        return {"*": {"rule": "top-k", "k": next(iter(counts.values()))}}
    return {path: {"rule": "top-k", "k": count} for path, count in counts.items()}


def _value(rule: str, ordered: Floats, share: float) -> float:
    """Return the value with which `rule` selects this share of the sorted statistics."""
    last = len(ordered) - 1
    if rule == "top-p":
        # selected: statistic < p
        return float(min(1.0, ordered[min(last, round(share * len(ordered)))]))
    # selected: statistic >= value
    value = float(ordered[min(last, max(0, round((1 - share) * len(ordered))))])
    return min(1.0, value) if rule == "dynamic-k" else value
