"""A fine-tune of a classifier's exits, from labelled data to a checkpoint of the same kind.

It writes as every fine-tune does. It is a path of its own because everything between is another:
examples in place of sequences of tokens, `exit_classifiers.tune_classifier` in place of Trainer.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from adaconvert.data.labels import check_single_label
from adaconvert.errors import OptionError, ResourceError, VerificationError
from adaconvert.evaluate.options import EvaluateOptions
from adaconvert.io.source import Source as Files
from adaconvert.layerwise.configs import load_config
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.sources import Described
from adaconvert.modeling.loading import load_model
from adaconvert.train import run
from adaconvert.train.arguments import is_out_of_memory
from adaconvert.train.checkpoints import refusing
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.exit_classifier_checks import check_running
from adaconvert.train.exit_classifier_data import (
    Drawn,
    Source,
    held_out,
    steps_of,
    training_sources,
)
from adaconvert.train.exit_classifier_validation import ClassifierValidator
from adaconvert.train.exit_classifiers import (
    Objective,
    Optimising,
    Step,
    places_of,
    tune_classifier,
)
from adaconvert.train.exit_config import OF_CLASSIFIERS
from adaconvert.train.parts import Chosen, choose, sites_of
from adaconvert.train.prepare import set_precision
from adaconvert.train.ranks import Group
from adaconvert.train.rates import Rate, Rates
from adaconvert.train.result import Curve, FinetuneResult, exit_notes, speed_of, tuned_summary
from adaconvert.train.session import TRAINED
from adaconvert.train.work import Work

if TYPE_CHECKING:
    from adaconvert.train.run import RunSettings


def finetune_classifier(
    item: Described, config: FinetuneConfig, settings: RunSettings, group: Group
) -> FinetuneResult:
    """Return once the destination holds the checkpoint with trained exits; see `api.finetune`.

    Args:
        item: a classifier with exits, checked.
        config: the fine-tune, its precision decided.
        settings: how it runs.
        group: of this process alone.

    Raises:
        OptionError: something asked for cannot be done to a classifier.
        DataError: labelled data are missing, damaged, or have labels the model has not.
    """
    check_running(settings)
    model = load_config(item.source)
    check_single_label(model)
    sources = training_sources(config, item.source.root, model)
    held = held_out(config, item.source.root, model)
    facts = run.facts_of(item, config, _digest(sources))
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    with run.opened(item, settings, group, facts, digest) as (staging, work):
        assert staging is not None
        result = _Run(item, config, settings, sources, held, work).result()
        run.write(item, config, settings, Files.open(work.path / TRAINED), staging, result)
        _check_loads(staging.path, sources[0])
        run.seal(item, staging, result, digest)
    return result


def _digest(sources: Sequence[Source]) -> str:
    return hashlib.sha256(" ".join(source.digest() for source in sources).encode()).hexdigest()


@dataclass(slots=True)
class _Run:
    """The training of one run; its model lies in the work folder afterwards.

    Attributes:
        item, config, settings: as for `finetune_classifier`.
        sources, held: what is trained and measured on.
        work: where the model goes.
        curve: every log entry.
    """

    item: Described
    config: FinetuneConfig
    settings: RunSettings
    sources: tuple[Source, ...]
    held: tuple[Source, ...]
    work: Work
    curve: list[dict[str, Any]] = field(default_factory=list)

    def result(self) -> FinetuneResult:
        """Return the result, its model saved.

        Raises:
            OptionError: an option does not fit the model.
            TrainingError: a loss or a gradient is not finite.
            ResourceError: memory or disk do not suffice.
        """
        config, steps = self.config, steps_of(self.config, self.sources)
        with quiet(), _explained():
            device = EvaluateOptions(device=_device(self.settings.device)).chosen_device()
            model = load_model(self.item.source.root, device=device)
            chosen = self._prepared(model)
            drawn = Drawn.of(self.sources, config.batch_size, config.seed, device)
            validator = self._validator(model, steps)
            validator.measure(0)
            # dropout is drawn from it
            torch.manual_seed(config.seed)
            tune_classifier(
                model,
                drawn,
                steps=steps,
                objective=self._objective(),
                train=config.train,
                optimising=self._optimising(model, chosen, steps),
                done=self._done(steps, drawn, validator),
            )
            validator.measure(steps)
            model.to("cpu")
            with refusing(self.work, TRAINED):
                model.save_pretrained(self.work.path / TRAINED, max_shard_size="2GB")
        tallies = drawn.tallies()
        examples = {"unit": self.sources[0].unit, "seen": sum(drawn.seen), "read": len(drawn)}
        summary = tuned_summary(
            config,
            steps=steps,
            tallies=tallies,
            examples=examples,
            chosen=chosen,
            curve=tuple(self.curve),
            validation=validator.history,
            notes=exit_notes(self.item),
        )
        curve: Curve = tuple(self.curve)
        return FinetuneResult(
            destination=self.settings.destination,
            summary=summary,
            speed=speed_of(curve),
            curve=curve,
        )

    def _prepared(self, model: Any) -> Chosen:
        """Return what is trained, once every parameter has the dtype it is trained in."""
        places_of(model, self._objective())
        chosen = choose(model, self.config.train)
        if chosen.routers:
            raise OptionError(
                "routers of experts are not trained with the exits of a classifier",
                where=f"--train {' --train '.join(self.config.train)}",
                hint="Name other parts: --train exits.",
            )
        set_precision(model, self.config.precision)
        return chosen

    def _objective(self) -> Objective:
        given = {name: getattr(self.config.exits, name) for name in OF_CLASSIFIERS}
        kind = given.pop("objective") or Objective().kind
        return Objective(kind=kind, **{n: v for n, v in given.items() if v is not None})

    def _optimising(self, model: Any, chosen: Chosen, steps: int) -> Optimising:
        config = self.config
        rates = Rates(
            usual=config.lr,
            router=None,
            parts=tuple(Rate.parse(text) for text in config.lr_of),
            routers=chosen.routers,
            sites=sites_of(model),
        )
        rates.check([name for name, p in model.named_parameters() if p.requires_grad])
        return Optimising(
            lr=config.lr,
            rate_of=rates.of,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            schedule=config.schedule,
            warmup=math.floor(config.warmup * steps),
            optimizer=config.optimizer,
            accumulate=config.accumulate,
            bf16=config.precision == "bf16",
        )

    def _validator(self, model: Any, steps: int) -> ClassifierValidator:
        return ClassifierValidator(
            model=model,
            sources=self.held,
            places=places_of(model, self._objective()),
            batch_size=self.config.batch_size,
            bf16=self.config.precision == "bf16",
            steps=steps,
            report=self.settings.report,
        )

    def _done(
        self, steps: int, drawn: Drawn, validator: ClassifierValidator
    ) -> Callable[[Step], None]:
        """Return what is told of every step: it logs, and measures when it is time to."""
        since: list[Step] = []
        clock = [time.perf_counter(), 0.0]
        every = self.config.validation.every

        def done(step: Step) -> None:
            since.append(step)
            if step.number % self.config.log_every == 0 or step.number in (1, steps):
                entry = _entry(since)
                tokens, now = sum(drawn.tokens), time.perf_counter()
                entry["tokens_per_second"] = (tokens - clock[1]) / max(now - clock[0], 1e-9)
                self.curve.append(entry)
                self.settings.report(_line(entry, steps))
                since.clear()
                clock[:] = [now, tokens]
            if every and step.number % every == 0:
                validator.measure(step.number)
                clock[0] = time.perf_counter()

        return done


def _entry(steps: Sequence[Step]) -> dict[str, Any]:
    """Return the log entry of some steps: means over their examples."""
    total = sum(step.examples for step in steps)

    def mean(value: Callable[[Step], float]) -> float:
        return sum(value(step) * step.examples for step in steps) / total

    def at(place: int) -> Callable[[Step], float]:
        return lambda step: step.exits[place]

    *places, end = steps[-1].exits
    return {
        "step": steps[-1].number,
        "loss": mean(lambda step: step.loss),
        **{f"exit_{place}": mean(at(place)) for place in places},
        "end": mean(at(end)),
        "grad_norm": steps[-1].norm,
        "learning_rate": steps[-1].rate,
    }


def _line(entry: dict[str, Any], steps: int) -> str:
    exits = [f"{n.replace('_', ' ')} {v:.4f}" for n, v in entry.items() if n.startswith("exit_")]
    parts = [
        f"loss {entry['loss']:.4f}",
        *exits,
        f"end {entry['end']:.4f}",
        f"gradient {entry['grad_norm']:.3g}",
        f"lr {entry['learning_rate']:.3g}",
        f"{entry['tokens_per_second']:.0f} tokens/s",
    ]
    return f"step {entry['step']}/{steps}: {', '.join(parts)}"


def _device(name: str) -> str | None:
    return None if name == "auto" else name


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to change when memory runs out in the body.

    Raises:
        ResourceError: it did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            "out of memory while training",
            hint="Give a lower --batch-size with a higher --accumulate, or a lower --seq-len.",
        ) from error


def _check_loads(folder: Any, source: Source) -> None:
    """Return only when the written checkpoint loads by itself and computes finite logits.

    Raises:
        VerificationError: it does not.
    """
    with quiet(), torch.inference_mode():
        model: Any = load_model(folder, dtype="float32")
        batch = source.batch(source.rows[:1], "cpu")
        del batch["labels"]
        logits = model(**batch).logits
    if not bool(torch.isfinite(logits).all()):
        raise VerificationError("the logits of the trained model are not all finite")
