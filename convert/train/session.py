"""The training itself: from a checkpoint and sequences to a model in the work folder."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.sources import Described, open_source
from adaconvert.modeling.loading import load_model
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data import Packed
from adaconvert.train.parts import Chosen, choose
from adaconvert.train.result import Curve
from adaconvert.train.work import Work

if TYPE_CHECKING:
    from adaconvert.train.sparsify import Meter
    from adaconvert.train.trainer import FinetuneTrainer

#: where in the work folder the trained model is.
TRAINED = "trained"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What training needs.

    Attributes:
        item: the checkpoint.
        config: the fine-tune.
        data: every sequence, in order.
        work: where checkpoints go, and which one to go on from.
        device: as in `run.RunSettings`.
        report: takes one line per log step.
        changed: config keys that differ from the checkpoint's.
    """

    item: Described
    config: FinetuneConfig
    data: Packed
    work: Work
    device: str
    report: Callable[[str], None]
    changed: Mapping[str, Any]

    def train(self) -> tuple[Chosen, Curve]:
        """Return what was trained and every log entry; `TRAINED` holds the model afterwards.

        Raises:
            OptionError: an option does not fit the model, or a loss is not finite.
        """
        with quiet():
            model: Any = load_model(self.item.source.root, **self.changed)
            chosen = choose(model, self.config.train)
            _set_precision(model, self.config.precision)
            meter = self._prepare(model)
            # per-expert tensors of native mixtures are not put together again when Trainer resumes
            # (huggingface/transformers issue 48805), so checkpoints hold them as in memory
            conversions = getattr(model, "_weight_conversions", None)
            if self.item.spec.num_experts:
                model._weight_conversions = []
            trainer = self._trainer(model, chosen, meter)
            resumed = self.work.resumed
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
            trainer.check_finite()
            model._weight_conversions = conversions
            model.to("cpu").save_pretrained(self.work.path / TRAINED, max_shard_size="2GB")
            curve = tuple(entry for entry in trainer.state.log_history if "loss" in entry)
            del trainer, model
            gc.collect()
        return chosen, curve

    def _prepare(self, model: Any) -> Meter | None:
        """Set selection, recomputation and penalty; return what watches activations."""
        from adaconvert.train.sparsify import Meter, attach

        config = self.config
        try:
            if config.select is not None:
                model.set_select(**config.select)
            if config.compute is not None:
                model.set_compute(config.compute)
        except ValueError as error:
            raise OptionError(str(error), where="--select or --compute") from error
        if config.checkpointing:
            _recompute(model)
        if not config.sparsity.watches:
            return None
        meter = Meter(config.sparsity)
        attach(model, self.item.spec, meter)
        return meter

    def _trainer(self, model: Any, chosen: Chosen, meter: Meter | None) -> FinetuneTrainer:
        from transformers import TrainerCallback, default_data_collator

        from adaconvert.train.trainer import FinetuneTrainer

        work = self.work

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                trainer.start_clock()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_log |= state.global_step == state.max_steps

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                work.completed(state.global_step)

        args = self._arguments()
        trainer = FinetuneTrainer(
            config=self.config,
            routers=chosen.routers,
            meter=meter,
            teacher=self._teacher(args.device),
            report=self.report,
            model=model,
            args=args,
            train_dataset=self.data,
            data_collator=default_data_collator,
            callbacks=[Callback()],
        )
        return trainer

    def _arguments(self) -> Any:
        from transformers import TrainingArguments

        config = self.config
        falling = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        args = TrainingArguments(
            output_dir=str(self.work.path),
            max_steps=config.total_steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.lr,
            lr_scheduler_type=falling,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=config.precision == "bf16",
            seed=config.seed,
            use_cpu=self.device == "cpu" or not _accelerated(),
            logging_steps=config.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="steps" if config.save_steps else "no",
            save_steps=config.save_steps or 1,
            save_total_limit=2,
            report_to=list(config.report_to) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        if args.n_gpu > 1:
            # several devices are torchrun's business; alone Trainer would copy the model to each
            args._n_gpu = 1
        return args

    def _teacher(self, device: Any) -> Any:
        """Return the dense teacher on the device of the student, None without distillation."""
        if not self.config.distill:
            return None
        given = self.config.teacher
        source = self.item if given is None else open_source(given)
        if source.spec.vocab != self.item.spec.vocab:
            raise OptionError(
                "reads other token ids",
                where="--teacher",
                expected=f"vocab_size {self.item.spec.vocab}",
                found=source.spec.vocab,
            )
        teacher: Any = load_model(source.source.root, device=str(device))
        if source.spec.adaptive is not None:
            teacher.set_select("all")
        teacher.requires_grad_(False)
        return teacher.float() if self.config.precision == "fp32" else teacher


def _set_precision(model: Any, precision: str) -> None:
    """Make float32 what is trained, and with "fp32" everything; nothing is rounded."""
    import torch

    halves = (torch.float16, torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dtype in halves and (parameter.requires_grad or precision == "fp32"):
            parameter.data = parameter.data.float()


def _recompute(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        # the only name transformers 5.17 has
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _accelerated() -> bool:
    """Return whether torch sees an accelerator."""
    import torch

    return bool(torch.accelerator.is_available())
