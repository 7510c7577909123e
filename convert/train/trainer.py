"""transformers' Trainer with our losses, parameter groups and log lines; nothing else is ours.

Every loss is a mean over the tokens of an optimiser step: a micro-batch contributes its own mean,
weighted by its share of the step's tokens, so accumulation equals one large batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from adaconvert.errors import OptionError
from adaconvert.train import health, log_lines, losses
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.depth_training import DepthTraining
from adaconvert.train.exit_training import ExitTraining
from adaconvert.train.rates import Rate, Rates, bare_name
from adaconvert.train.routing import Routers
from adaconvert.train.sparsify import Meter

Report = Callable[[str], None]
#: in a checkpoint: what was counted of those so far.
ROUTING_FILE = "routing.json"
#: in a checkpoint: the state of what moves null biases.
BUDGETS_FILE = "budgets.json"
#: in a checkpoint: the state of what moves thresholds of blocks that tokens may skip.
DEPTH_FILE = "depth.json"


class FinetuneTrainer(Trainer):  # type: ignore[misc]
    """See the module docstring.

    Args:
        config: the fine-tune.
        routers: names of parameters that learn at the routers' rate.
        meter: watches activations, None when nobody does.
        watch: watches routers, None when nobody does.
        flops: per trained token and what the device does a second; None where unknown.
        teacher: dense model on the same device, None without distillation.
        exits: how early exits are trained, None where none are.
        depth: how blocks that tokens may skip are, likewise.
        report: takes one line per log step.
        given: what Trainer takes.
    """

    optimizer: Any

    def __init__(
        self,
        *,
        config: FinetuneConfig,
        routers: frozenset[str],
        meter: Meter | None,
        teacher: Any,
        report: Report,
        watch: Routers | None = None,
        flops: tuple[float, float] | None = None,
        exits: ExitTraining | None = None,
        depth: DepthTraining | None = None,
        **given: Any,
    ) -> None:
        super().__init__(**given)
        # the number of tokens of a whole step reaches compute_loss, which divides by it itself
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self._config = config
        self._meter = meter
        self._watch = watch
        self._flops = flops
        model: Any = self.model
        sites = model.adaptive_sites() if hasattr(model, "adaptive_sites") else ()
        self._rates = Rates(
            usual=config.lr,
            router=config.router_lr,
            parts=tuple(Rate.parse(text) for text in config.lr_of),
            routers=routers,
            sites=tuple(sites),
        )
        if watch is not None:
            watch.reduce = self._summed
            self.add_callback(_after_each_step(lambda step: watch.step_done()))
        if depth is not None:
            self.add_callback(_after_each_step(depth.step_done))
        self._teacher, self.exits, self.depth = teacher, exits, depth
        self._report = report
        self._sums: dict[str, Tensor] = {}
        self._unchecked: list[tuple[str, int, Tensor]] = []
        self._logged = (0, time.perf_counter())

    # -- what is trained

    def create_optimizer(self, model: Any = None) -> Any:
        """Return the optimiser: matrices with and the rest without weight decay, routers at their
        own rate; frozen parameters are in no group and have no state."""
        if self.optimizer is None:
            chosen = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, chosen)
            self.optimizer = kind(self._groups(chosen), **settings)
        return self.optimizer

    def _groups(self, model: Any) -> list[dict[str, Any]]:
        decayed = {bare_name(name) for name in self.get_decay_parameter_names(model)}
        groups: dict[tuple[float, bool], list[Any]] = {}
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._rates.check(trained)
        for name, parameter in trained.items():
            key = (self._rates.of(name), bare_name(name) in decayed)
            groups.setdefault(key, []).append(parameter)
        decay = self._config.weight_decay
        return [
            {"params": parameters, "lr": rate, "weight_decay": decay if decays else 0.0}
            for (rate, decays), parameters in groups.items()
        ]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # the data are already in their order, which resuming must find again
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    # -- losses

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return what this micro-batch adds to the step's loss; penalties join going back."""
        labels = inputs["labels"]
        fed = {key: value for key, value in inputs.items() if key != "labels"}
        targets = (labels[:, 1:] != losses.IGNORED).sum(dim=1)
        whole = targets.sum() if num_items_in_batch is None else num_items_in_batch
        exact = torch.float64 if self._config.precision == "fp64" else torch.float32
        shares = targets.to(exact) / torch.as_tensor(whole, device=labels.device).clamp_min(1)
        scale = self._averaged_over(num_items_in_batch)
        self._begin(labels, fed, shares, scale)
        outputs, parts = self._run(model, fed, labels, shares.sum())
        total = self._total(parts, shares.sum(), scale)
        if torch.is_grad_enabled() and not total.requires_grad:
            raise OptionError(
                "nothing that is trained changes the loss",
                where="--train",
                hint="Experts of adaptive checkpoints weigh one, so their routers get no gradient "
                "from the language-model loss; `adaconvert d2dmoe` fits them.",
            )
        return (total, outputs) if return_outputs else total

    def _run(
        self, model: Any, fed: dict[str, Any], labels: Tensor, share: Tensor
    ) -> tuple[Any, dict[str, tuple[float, Tensor]]]:
        """Return the model's output, None where exits are trained, and the parts of the loss."""
        more: dict[str, tuple[float, Tensor]] = {}
        if self._config.distill_hidden:
            fed["output_hidden_states"] = True
        if self.exits is not None:
            step, steps = self.state.global_step, self.state.max_steps
            total, told = self.exits.losses(fed, labels, step, steps)
            parts = {name: (0.0, value) for name, value in told.items()}
            parts["exits"] = (1.0, total)
            outputs = None
        elif self.depth is not None:
            with self.depth.collecting(fed, share) as more:
                outputs = model(**fed, use_cache=False)
        else:
            outputs = model(**fed, use_cache=False)
        if self._watch is not None:
            self._watch.pause()
        return outputs, parts if outputs is None else self._parts(outputs, labels, fed) | more

    def _begin(self, labels: Tensor, fed: Mapping[str, Any], shares: Tensor, scale: float) -> None:
        """Tell those who watch what the micro-batch is worth.

        Args:
            labels: [B, S].
            fed: what the model gets.
            shares: [B] of the step's predicted tokens.
            scale: of gradients.
        """
        step, steps = self.state.global_step, self.state.max_steps
        mask = fed.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.shape == labels.shape else None
        if self._meter is not None:
            sparsity = self._config.sparsity
            self._meter.begin(
                coefficient=sparsity.at(step, steps),
                share=shares.sum() * scale,
                mask=mask,
                newness=sparsity.newness(step, steps),
            )
        if self._watch is not None:
            real = torch.ones_like(labels) if mask is None else mask
            ending = step >= steps - health.last_steps(steps)
            now = {"weights": shares, "mask": real.float(), "scale": scale}
            self._watch.begin(ending=ending, step=step, steps=steps, **now)

    def _averaged_over(self, items: Any) -> float:
        """Return by what gradients are divided when processes average them; the count of a step's
        tokens is over all processes, so their losses are to be added instead."""
        if items is None or not self.args.average_tokens_across_devices:
            return 1.0
        return float(self.accelerator.num_processes // self.get_tp_size())

    def _summed(self, value: Tensor) -> Tensor:
        """Return the sum over processes."""
        found: Tensor = self.accelerator.reduce(value, reduction="sum")
        # processes that hold parts of one model see the same tokens
        return found / int(self.get_tp_size())

    def _parts(
        self, outputs: Any, labels: Tensor, fed: Mapping[str, Any]
    ) -> dict[str, tuple[float, Tensor]]:
        """Return name -> (factor, mean over the micro-batch)."""
        config, logits = self._config, outputs.logits
        parts = {"lm": (config.lm, losses.language_model(logits, labels))}
        if self._teacher is None:
            return parts
        bf16 = config.precision == "bf16"
        with torch.no_grad(), torch.autocast(logits.device.type, torch.bfloat16, enabled=bf16):
            theirs = self._teacher(**fed, use_cache=False)
        if config.distill:
            found = losses.distillation(logits, theirs.logits, labels, config.temperature)
            parts["distill"] = (config.distill, found)
        if config.distill_hidden:
            # the first are the embeddings, before any layer
            ours, goals = outputs.hidden_states[1:], theirs.hidden_states[1:]
            found = losses.hidden_distance(ours, goals, labels)
            parts["distill_hidden"] = (config.distill_hidden, found)
        return parts

    def _total(
        self, parts: Mapping[str, tuple[float, Tensor]], share: Tensor, scale: float
    ) -> Tensor:
        total = torch.zeros((), device=self.args.device)
        for name, (factor, value) in parts.items():
            weighted = value * share
            total = total + (factor * scale) * weighted
            self._count(name, weighted.detach())
        self._unchecked.append(("loss", self.state.global_step + 1, total.detach()))
        return total

    def _count(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    # -- what must not go on

    def check_finite(self) -> None:
        """Return only when every loss and gradient seen so far is one to train on.

        Raises:
            TrainingError: one is not; names the step.
        """
        seen, self._unchecked = self._unchecked, []
        for what, step, value in seen:
            health.check_number(what, step, value)

    def finish(self) -> list[health.LayerHealth]:
        """Return how routers fared over the last steps, of a model that is fit to be written.

        Raises:
            TrainingError: a loss, gradient or weight is not finite, or a router collapsed.
        """
        self.check_finite()
        health.check_weights(self.model.named_parameters(), self.state.global_step)
        if self._watch is None:
            return []
        threshold = self._config.routing.collapse
        steps = health.last_steps(self.state.max_steps)
        health.check_routers(self._watch.judged(), threshold, steps)
        return self._watch.at_the_end()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a micro-batch, after its backward pass."""
        # what the step before left: asking for it now costs an accelerator no waiting
        self.check_finite()
        loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, Tensor):
            self._unchecked.append(("gradient norm", self.state.global_step + 1, norm.detach()))
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # what is kept is to be good
        self.check_finite()
        health.check_weights(self.model.named_parameters(), self.state.global_step)
        # processes talk to each other here, so nothing that can fail in one of them comes before
        routing = None if self._watch is None else json.dumps(self._watch.state())
        super()._save_checkpoint(model, trial)
        if routing is not None and self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / ROUTING_FILE).write_text(routing, encoding="utf-8")
            if self._watch is not None and self._watch.budgets.asked:
                budgets = json.dumps(self._watch.budgets.state())
                (folder / BUDGETS_FILE).write_text(budgets, encoding="utf-8")
        if self.depth is not None and self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / DEPTH_FILE).write_text(json.dumps(self.depth.state()), encoding="utf-8")

    def _restore_routing(self, folder: Path) -> None:
        """Go on counting where a checkpoint left off."""
        kept = folder / ROUTING_FILE
        # what it holds is summed over processes, so only one goes on from it
        if self._watch is not None and kept.is_file() and self.is_world_process_zero():
            self._watch.restore(json.loads(kept.read_text(encoding="utf-8")), self.args.device)
        budgets = folder / BUDGETS_FILE
        if self._watch is not None and budgets.is_file():
            self._watch.budgets.restore(json.loads(budgets.read_text(encoding="utf-8")))
        depth = folder / DEPTH_FILE
        if self.depth is not None and depth.is_file():
            self.depth.restore(json.loads(depth.read_text(encoding="utf-8")))

    # -- what is said

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add loss parts, speed and sparsity to what Trainer logs, and report the line."""
        if "loss" not in logs:
            return
        self.check_finite()
        steps = max(self.state.global_step - self._logged[0], 1)
        now = time.perf_counter()
        logs |= self._drained(steps)
        warnings = self._routed(logs, steps)
        speed = steps * self._config.step_tokens / max(now - self._logged[1], 1e-9)
        logs["tokens_per_second"] = speed
        if self._flops is not None:
            able = self._flops[1] * self.accelerator.num_processes
            logs["mfu"] = speed * self._flops[0] / able
        self._logged = (self.state.global_step, now)
        super().log(logs, start_time)
        for text in (log_lines.line(logs, self.state.global_step, self.state.max_steps), *warnings):
            self._report(text)

    def _routed(self, logs: dict[str, Any], steps: int) -> list[str]:
        """Add losses and state of the routers to a log entry; return warnings."""
        if self._watch is None:
            return []
        values, layers = self._watch.drain(steps)
        logs |= values | health.logged(layers)
        threshold = self._config.routing.collapse if self._watch.are_to_be_even else 0.0
        return health.warnings(layers, threshold)

    def pause(self, seconds: float) -> None:
        """Count speed as if the last `seconds` had not been."""
        self._logged = (self._logged[0], self._logged[1] + seconds)

    def start_clock(self) -> None:
        """Count speed from the present step and time on."""
        self._logged = (self.state.global_step, time.perf_counter())

    def _drained(self, steps: int) -> dict[str, Any]:
        summed = {name: self._summed(value) for name, value in self._sums.items()}
        found: dict[str, Any] = {name: float(value) / steps for name, value in summed.items()}
        self._sums = {}
        if self._meter is None:
            return found
        penalty, ffn, networks = self._meter.drain(steps)
        if not (ffn or networks):
            return found
        # each process weighs its own tokens as if they were those of all
        seen = torch.tensor([penalty, *ffn, *networks], device=self.args.device)
        penalty, *zeros = self.accelerator.reduce(seen, reduction="mean").tolist()
        settings = self._config.sparsity
        coefficient = settings.at(self.state.global_step - 1, self.state.max_steps)
        return found | {
            settings.penalty: penalty,
            "coefficient": coefficient,
            **log_lines.zeros(zeros[: len(ffn)], zeros[len(ffn) :]),
        }


def _after_each_step(done: Callable[[int], None]) -> Any:
    """Return what calls `done` with the step that was done, counted from 0."""

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
            done(state.global_step - 1)

    return Callback()
