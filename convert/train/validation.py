"""The loss on text that is not trained on: before, during and after training.

Documents and conversations stand alone here, cut into blocks of at most L tokens, as `adaconvert
evaluate` cuts text; so the loss of text is the one it reports for blocks of that length.

Shapes: N blocks, L tokens of a block, B blocks of a batch, S tokens of its longest block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from adaconvert.data.text import documents_of
from adaconvert.data.tokens import Limits, load_tokenizer, padding_id, token_blocks
from adaconvert.errors import DataError, OptionError, TrainingError
from adaconvert.io.names import escape
from adaconvert.train.bounds import whole
from adaconvert.train.data_reader import ChatEncoder, Looked
from adaconvert.train.sources import TEXT, Opened, Raw, open_source, several

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from adaconvert.train.config import FinetuneConfig

    Array = numpy.ndarray[Any, Any]

#: option -> field of `Validation`.
VALIDATION_OPTIONS: Final = {
    "valid": "where",
    "valid_split": "split",
    "valid_tokens": "tokens",
    "eval_every": "every",
}
#: read for each token that is used; text has three to five, so this is far more than enough.
_CHARACTERS: Final = 64
#: name of the loss in Trainer's log.
_LOGGED: Final = "validation_loss"
_EACH: Final = "validation_losses"
#: names of what null experts leave of the experts, where there are any.
_SHARE: Final = "validation_share"
_SHARES: Final = "validation_shares"
_BLOCKS: Final = "validation_share_by_layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Which text is held out.

    Attributes:
        where: as the sources of training; each has a loss of its own.
        split: of hub data sets, or the word that names the files of folders.
        tokens: of each source, drawn by the run's seed; of a large one from its beginning.
        every: steps between measurements; None for one before and one after training.
    """

    where: tuple[str, ...] = ()
    split: str | None = None
    tokens: int = 100_000
    every: int | None = None

    def __post_init__(self) -> None:
        whole("valid_tokens", self.tokens, 2)
        if self.every is not None:
            whole("eval_every", self.every, 1)
        for name in ("split", "every"):
            if getattr(self, name) is not None and not self.where:
                flag = "--valid-split" if name == "split" else "--eval-every"
                raise OptionError("does nothing without --valid", where=flag)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Validation:
        """Return what options with the names of `VALIDATION_OPTIONS` ask for.

        Raises:
            OptionError: a value is wrong.
        """
        given = {VALIDATION_OPTIONS[name]: value for name, value in options.items()}
        return cls(**{**given, "where": tuple(map(str, several(given.get("where", ()))))})

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names outputs may carry."""
        from adaconvert.train.config import DataSource

        return tuple(DataSource(where=where).label for where in self.where)

    def to_json(self) -> dict[str, Any]:
        """Return what is measured, without paths of this machine."""
        return {
            "names": list(self.labels),
            "split": self.split,
            "tokens": self.tokens,
            "every": self.every,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One held-out source.

    Attributes:
        name: of the source.
        ids: int64 [N, L].
        real: bool [N, L], False for padding, which is always at the end.
        counted: bool [N, L], tokens whose prediction counts.
    """

    name: str
    ids: Array
    real: Array
    counted: Array


def hold_out(config: FinetuneConfig, folder: Path) -> tuple[Held, ...]:
    """Return the held-out sources of a run.

    Args:
        config: the fine-tune.
        folder: checkpoint whose tokenizer is used.

    Raises:
        DataError: one is missing, damaged or empty, or does not fit the tokenizer.
    """
    asked, fields = config.validation, (config.text_field, config.reading.messages_field)
    found = []
    for where, label in zip(asked.where, asked.labels, strict=True):
        source = open_source(where, label, fields=fields, split=asked.split, streaming=True)
        found.append(
            _text(source, config, folder)
            if source.format == TEXT
            else _chats(source, config, folder)
        )
    return tuple(found)


def _beginning(source: Opened, config: FinetuneConfig) -> list[Raw]:
    """Return the rows of a source, of a large one enough to draw the tokens from."""
    room = _CHARACTERS * config.validation.tokens
    found = []
    for raw in source.rows():
        if raw.value is not None:
            found.append(raw)
            room -= len(str(raw.value))
        if room <= 0:
            break
    return found


def _text(source: Opened, config: FinetuneConfig, folder: Path) -> Held:
    raws = _beginning(source, config)
    if not raws:
        raise DataError("holds no text", where=escape(source.label))
    documents = documents_of(tuple(str(raw.value) for raw in raws), tuple(raw.name for raw in raws))
    blocks = token_blocks(
        documents,
        folder,
        length=config.seq_len,
        max_tokens=config.validation.tokens,
        seed=config.seed,
    )
    return Held(name=source.label, ids=blocks.ids, real=blocks.weights, counted=blocks.weights)


def _chats(source: Opened, config: FinetuneConfig, folder: Path) -> Held:
    import numpy

    limits, tokenizer = Limits.of(folder), load_tokenizer(folder)
    encoder = ChatEncoder(tokenizer, limits, config.seq_len, folder.name)
    raws = _beginning(source, config)
    generator = numpy.random.Generator(numpy.random.Philox(config.seed))
    samples, looked, room = [], Looked(), config.validation.tokens
    for index in generator.permutation(len(raws)):
        sample = encoder(raws[int(index)], looked)
        if sample is not None and room > 0:
            samples.append(sample)
            room -= len(sample.ids)
        if room <= 0:
            break
    if not samples:
        raise DataError(
            "holds no conversation with an answer to predict", where=escape(source.label)
        )
    shape = (len(samples), config.seq_len)
    ids = numpy.full(shape, padding_id(tokenizer, limits.vocab), dtype=numpy.int64)
    real, counted = numpy.zeros(shape, dtype=bool), numpy.zeros(shape, dtype=bool)
    for row, sample in enumerate(samples):
        size = len(sample.ids)
        ids[row, :size], real[row, :size] = sample.ids, True
        counted[row, :size] = sample.learned
    return Held(name=source.label, ids=ids, real=real, counted=counted)


def measure(model: Any, held: Held, *, batch_size: int, bf16: bool = False) -> tuple[float, int]:
    """Return the summed loss of the counted tokens in nats, and their number.

    The model computes as in training but without dropout; it is left in the mode it was in.

    Args:
        model: a causal language model.
        held: the text.
        batch_size: blocks that run together.
        bf16: multiply matrices in bfloat16.
    """
    import torch

    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for ids, mask, targets in batches(held, batch_size):
            fed = {"input_ids": ids.to(device)}
            if mask is not None:
                fed["attention_mask"] = mask.to(device)
            logits = model(**fed, use_cache=False).logits[:, :-1]
            wanted = targets[:, 1:].to(device)
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum"
                )
            )
            count += int((wanted >= 0).sum())
    model.train(was_training)
    return total, count


def batches(held: Held, size: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield ids, mask and targets, [B, S] each, in batches of similar length; -100 for targets that
    do not count, no mask without padding."""
    import numpy
    import torch

    from adaconvert.train.losses import IGNORED

    lengths = held.real.sum(1)
    order = numpy.argsort(-lengths, kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = int(lengths[rows[0]])
        ids = torch.from_numpy(held.ids[rows, :longest])
        real = torch.from_numpy(held.real[rows, :longest])
        counted = torch.from_numpy(held.counted[rows, :longest])
        targets = ids.masked_fill(~counted, IGNORED)
        yield ids, None if bool(real.all()) else real.long(), targets


class Validator:
    """Measures while a Trainer trains.

    Args:
        config: the fine-tune.
        held: the sources; without any nothing is measured.
        report: takes one line per measurement.

    Attributes:
        history: {"step", "loss", "names", "losses"} of every measurement, those of the run that is
            resumed included; with null experts also "share", "shares" and "share_by_layer", the
            real experts that ran over those of the model without null ones: of all, of each source
            and of each block; with routed blocks "run", "compute" and "top_k", see
        `depth_validation`; with exits "exits", {blocks before it: {"loss", "agreement"}}, how
            often an exit chooses the token the whole model does.
    """

    def __init__(
        self, config: FinetuneConfig, held: Sequence[Held], report: Callable[[str], None]
    ) -> None:
        self.history: list[dict[str, Any]] = []
        self._config = config
        self._held = held
        self._report = report

    def register(self, trainer: Any) -> None:
        """Measure from now on whenever `trainer` comes to a step that asks for it."""
        from transformers import TrainerCallback

        if not self._held:
            return
        validator = self
        every = self._config.validation.every

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                validator._recall(state.log_history)
                if not state.global_step:
                    validator._measure(trainer)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if every and state.global_step % every == 0:
                    validator._measure(trainer)

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                validator._measure(trainer)

        trainer.add_callback(Callback())

    def _recall(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Take over what was measured before an interruption."""
        self.history = [self._entry(entry) for entry in log if _LOGGED in entry]

    def _entry(self, logged: Mapping[str, Any]) -> dict[str, Any]:
        from adaconvert.train.depth_validation import DEPTH_LOGGED
        from adaconvert.train.exit_validation import recalled_exits

        entry = {"step": logged["step"], "loss": logged[_LOGGED]}
        entry |= recalled_exits(logged)
        entry |= {"names": [held.name for held in self._held], "losses": list(logged[_EACH])}
        spent = {"share": _SHARE, "shares": _SHARES, "share_by_layer": _BLOCKS, **DEPTH_LOGGED}
        return entry | {ours: logged[name] for ours, name in spent.items() if name in logged}

    def _measure(self, trainer: Any) -> None:
        """Measure once a step, and log it where Trainer logs."""
        from transformers import Trainer

        from adaconvert.train.budgets import realised
        from adaconvert.train.depth_validation import deciding, depth_words, looking_ahead
        from adaconvert.train.exit_validation import exit_lines, logged_exits, measured_exits

        state = trainer.state
        if self.history and self.history[-1]["step"] == state.global_step:
            return
        began = time.perf_counter()
        found, shares = [], []
        exits = measured_exits(trainer, self._held, self._config.batch_size)
        how: Any = {
            "batch_size": self._config.batch_size,
            "bf16": self._config.precision == "bf16",
        }
        with deciding(trainer) as ran:
            for held in self._held:
                with realised(trainer.model) as share:
                    found.append(measure(trainer.model, held, **how))
                    shares.append(share())
        losses = [total / count for total, count in found]
        loss = sum(total for total, _ in found) / sum(count for _, count in found)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss is {loss}; training stops",
                where=f"step {state.global_step}",
                hint="Lower --lr or --sparsity, lengthen --warmup, or look at the held-out data.",
            )
        logged: dict[str, Any] = {_LOGGED: loss, _EACH: losses, **_spent(shares, found)}
        logged |= {
            **logged_exits(exits),
            **ran(),
            **looking_ahead(trainer, self._held, **how),
        }
        self.history.append(self._entry({"step": state.global_step, **logged}))
        due = trainer.control.should_log
        # not our own `log`, which tells of training steps
        Trainer.log(trainer, logged)
        # logging takes back that the step is to be logged
        trainer.control.should_log = due
        trainer.pause(time.perf_counter() - began)
        if state.is_world_process_zero:
            spent = f", share {logged[_SHARE]:.3f}" if _SHARE in logged else ""
            place = f"step {state.global_step}/{state.max_steps}"
            self._report(f"{place}: validation {loss:.4f}{spent}{depth_words(logged)}")
            for text in exit_lines(exits):
                self._report(text)


def _spent(
    shares: Sequence[Sequence[float]], found: Sequence[tuple[float, int]]
) -> dict[str, float | list[float]]:
    """Return what is logged of null experts, nothing without them.

    Args:
        shares: of every block on each source.
        found: summed loss and counted tokens of each, by which the means are weighted.
    """
    if not shares or not all(shares):
        return {}
    weights = [count for _, count in found]

    def mean(values: Sequence[float]) -> float:
        return sum(s * w for s, w in zip(values, weights, strict=True)) / sum(weights)

    known = [sum(blocks) / len(blocks) for blocks in shares]
    return {
        _SHARE: mean(known),
        _SHARES: known,
        _BLOCKS: [mean(block) for block in zip(*shares, strict=True)],
    }
