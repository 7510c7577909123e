"""transformers' Trainer with our losses, parameter groups and log lines; nothing else is ours.

Every loss is a mean over the tokens of an optimiser step: a micro-batch contributes its own mean,
weighted by its share of the step's tokens, so accumulation equals one large batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer

from adaconvert.errors import OptionError
from adaconvert.train import losses
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.sparsify import Meter

Report = Callable[[str], None]


class FinetuneTrainer(Trainer):  # type: ignore[misc]
    """See the module docstring.

    Args:
        config: the fine-tune.
        routers: names of parameters that learn at the routers' rate.
        meter: watches activations, None when nobody does.
        teacher: dense model on the same device, None without distillation.
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
        **given: Any,
    ) -> None:
        super().__init__(**given)
        # the number of tokens of a whole step reaches compute_loss, which divides by it itself
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self._config = config
        self._routers = routers
        self._meter = meter
        self._teacher = teacher
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
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[Any]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (name in self._routers, name in decayed)
                groups.setdefault(key, []).append(parameter)
        rate = self._config.lr if self._config.router_lr is None else self._config.router_lr
        return [
            {
                "params": parameters,
                "lr": rate if is_router else self._config.lr,
                "weight_decay": self._config.weight_decay if decays else 0.0,
            }
            for (is_router, decays), parameters in groups.items()
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
        targets = (labels[:, 1:] != losses.IGNORED).sum()
        share = 1.0 if num_items_in_batch is None else targets / num_items_in_batch
        coefficient = self._config.sparsity.at(self.state.global_step, self.state.max_steps)
        if self._meter is not None:
            mask = fed.get("attention_mask")
            self._meter.begin(coefficient=coefficient, share=share, mask=mask)
        outputs = model(**fed, use_cache=False)
        total = self._total(self._parts(outputs.logits, labels, fed), share)
        if torch.is_grad_enabled() and not total.requires_grad:
            raise OptionError(
                "nothing that is trained changes the loss",
                where="--train",
                hint="Experts of adaptive checkpoints weigh one, so their routers get no gradient "
                "from the language-model loss; `adaconvert d2dmoe` fits them.",
            )
        return (total, outputs) if return_outputs else total

    def _parts(
        self, logits: Tensor, labels: Tensor, fed: Mapping[str, Any]
    ) -> dict[str, tuple[float, Tensor]]:
        """Return name -> (factor, mean over the micro-batch)."""
        config = self._config
        parts = {"lm": (config.lm, losses.language_model(logits, labels))}
        if self._teacher is not None:
            bf16 = config.precision == "bf16"
            with torch.no_grad(), torch.autocast(logits.device.type, torch.bfloat16, enabled=bf16):
                theirs = self._teacher(**fed, use_cache=False).logits
            found = losses.distillation(logits, theirs, labels, config.temperature)
            parts["distill"] = (config.distill, found)
        return parts

    def _total(self, parts: Mapping[str, tuple[float, Tensor]], share: float | Tensor) -> Tensor:
        total = torch.zeros((), device=self.args.device)
        for name, (factor, value) in parts.items():
            weighted = value * share
            total = total + factor * weighted
            self._count(name, weighted.detach())
        self._unchecked.append(("loss", self.state.global_step + 1, total.detach()))
        return total

    def _count(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    # -- what must not go on

    def check_finite(self) -> None:
        """Return only when every loss and gradient seen so far is finite.

        Raises:
            OptionError: one is not; names the step.
        """
        seen, self._unchecked = self._unchecked, []
        for what, step, value in seen:
            if not bool(torch.isfinite(value)):
                raise OptionError(
                    f"the {what} is {float(value)}; training stops",
                    where=f"step {step}",
                    hint="Lower --lr or --sparsity, lengthen --warmup, or look at the data there.",
                )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a micro-batch, after its backward pass."""
        # what the step before left: asking for it now costs an accelerator no waiting
        self.check_finite()
        loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if isinstance(norm, Tensor):
            self._unchecked.append(("gradient norm", self.state.global_step + 1, norm.detach()))
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_finite()
        super()._save_checkpoint(model, trial)

    # -- what is said

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add loss parts, speed and sparsity to what Trainer logs, and report the line."""
        if "loss" not in logs:
            return
        self.check_finite()
        steps = self.state.global_step - self._logged[0]
        now = time.perf_counter()
        logs |= self._drained(max(steps, 1))
        logs["tokens_per_second"] = steps * self._config.step_tokens / (now - self._logged[1])
        self._logged = (self.state.global_step, now)
        super().log(logs, start_time)
        self._report(line(logs, self.state.global_step, self.state.max_steps))

    def start_clock(self) -> None:
        """Count speed from the present step and time on."""
        self._logged = (self.state.global_step, time.perf_counter())

    def _drained(self, steps: int) -> dict[str, Any]:
        found: dict[str, Any] = {name: float(s) / steps for name, s in self._sums.items()}
        self._sums = {}
        if self._meter is None:
            return found
        penalty, zeros = self._meter.drain(steps)
        if not zeros:
            return found
        settings = self._config.sparsity
        coefficient = settings.at(self.state.global_step - 1, self.state.max_steps)
        return found | {
            settings.penalty: penalty,
            "coefficient": coefficient,
            "sparsity": sum(zeros) / len(zeros),
            "sparsity_by_layer": [round(value, 4) for value in zeros],
        }


#: what a log line shows, in this order, and how.
_SHOWN = {
    "lm": "lm {:.4f}",
    "distill": "distill {:.4f}",
    "hoyer": "hoyer {:.4g}",
    "l1": "l1 {:.4g}",
    "sparsity": "zeros {:.1%}",
    "grad_norm": "gradient {:.3g}",
    "learning_rate": "lr {:.3g}",
    "tokens_per_second": "{:.0f} tokens/s",
}


def line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """Return one line about the steps since the last one."""
    shown = [text.format(logs[name]) for name, text in _SHOWN.items() if name in logs]
    return f"step {step}/{steps}: {', '.join(shown)}"
