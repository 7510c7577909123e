"""The training itself: from a checkpoint and sequences to a model in the work folder."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError
from adaconvert.io.adapter_files import ADAPTER_WEIGHTS
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.sources import Described, open_source
from adaconvert.modeling.loading import load_model
from adaconvert.train import adapter_folder
from adaconvert.train.adapt_config import Machine
from adaconvert.train.arguments import arguments_of, explained
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data_stream import Data
from adaconvert.train.parts import Chosen
from adaconvert.train.ranks import Group
from adaconvert.train.result import Curve
from adaconvert.train.trackers import log_into
from adaconvert.train.utilisation import utilisation
from adaconvert.train.validation import Validator
from adaconvert.train.work import Work

if TYPE_CHECKING:
    from adaconvert.train.depth_training import DepthTraining
    from adaconvert.train.exit_training import ExitTraining
    from adaconvert.train.prepare import Prepared as Ready
    from adaconvert.train.routing_setup import Prepared
    from adaconvert.train.sparsify import Meter
    from adaconvert.train.trainer import FinetuneTrainer

#: where in the work folder the trained model is.
TRAINED = "trained"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What training made.

    Attributes:
        chosen: what was trained.
        curve: every log entry.
        health: how routers fared, and what blocks that tokens may skip decide by.
        state: what changed, by name, where the model itself cannot be written; else None.
        model, ready: the model and what became of it, where it can.
    """

    chosen: Chosen
    curve: Curve
    health: dict[str, Any]
    state: Mapping[str, Any] | None
    model: Any
    ready: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What training needs.

    Attributes:
        item: the checkpoint.
        config: the fine-tune.
        data: every sequence, in order.
        validator: measures the loss on held-out text.
        work: where checkpoints go, and which one to go on from.
        device: as in `run.RunSettings`.
        report: takes one line per log step.
        changed: config keys that differ from the checkpoint's.
        group: the processes that train together.
        logs: folder for the files of experiment trackers.
        progress: show progress bars on a terminal.
    """

    item: Described
    config: FinetuneConfig
    data: Data
    validator: Validator
    work: Work
    device: str
    report: Callable[[str], None]
    changed: Mapping[str, Any]
    group: Group
    logs: Path
    progress: bool = False

    def train(self) -> tuple[Chosen, Curve, dict[str, Any]]:
        """Return what was trained, every log entry and how routers fared; `TRAINED` holds the model
        afterwards, with adapters added to its weights.

        Raises:
            OptionError: an option does not fit the model.
            TrainingError: a loss, gradient or weight is not finite, or a router collapsed.
            ResourceError: memory or disk do not suffice.
        """
        with quiet(), explained(self.config, self.work.hint):
            done = self._fit()
            view = self.item.view
            if view is not None:
                state = adapter_folder.trained_of(view, done.state or {})
                self.group.on_main(lambda: self._save_adapters(state))
            elif done.state is None:
                self.group.on_main(lambda: self._save(done.model, done.ready))
            else:
                gc.collect()
                whole = done.state
                self.group.on_main(lambda: self._save(*self._whole(whole)))
            gc.collect()
        return done.chosen, done.curve, done.health

    def _fit(self) -> _Done:
        """Return what training made; of a model in parts, or rounded to 4 bits, what changed."""
        from adaconvert.train import routing_setup
        from adaconvert.train.depth_training import depth_training
        from adaconvert.train.exit_heads import never_leaving
        from adaconvert.train.exit_training import exit_training
        from adaconvert.train.prepare import prepare
        from adaconvert.train.shards import gathered

        model = self._loaded()
        ready = prepare(model, self.config, device=self._place())
        if self.item.view is not None:
            adapter_folder.settle(model, self.item.view)
        meter = self._prepare(model)
        routing = routing_setup.prepare(model, self.item, self.config, ready.chosen)
        exits = exit_training(model, self.item, self.config)
        depth = depth_training(model, self.item, self.config)
        trainer = self._trainer(model, routing.chosen, meter, routing, exits, depth)
        resumed = self.work.resumed
        with never_leaving(model):
            machine = self.config.machine
            if resumed is None and not machine.sharded and machine.experts_over == 1:
                self._fit_depth(model, depth)
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        apart = self._is_apart
        held = self.validator.history[-1].get("share_by_layer") if self.validator.history else None
        health = routing.summary(trainer.finish(), self.config.total_steps, held)
        return _Done(
            chosen=routing.chosen,
            health=health | ({} if depth is None else {"depth": depth.to_json()}),
            curve=tuple(entry for entry in trainer.state.log_history if "loss" in entry),
            state=gathered(model, keep=self.group.is_main) if apart else None,
            model=None if apart else model,
            ready=None if apart else ready,
        )

    def _fit_depth(self, model: Any, depth: Any) -> None:
        """Fit what skipped tokens run instead, where it adds nothing yet, and routers that say
        nothing yet; processes do it alike, as they see the same sequences."""
        from adaconvert.train.depth_fit import fit_depth

        routers = depth is not None and depth.holds
        fitted = fit_depth(model, self.data, self.config, routers=routers, progress=self.progress)
        if fitted is None:
            return
        for line in fitted.lines():
            self.report(line)
        if depth is not None:
            depth.begin(fitted.ranked)

    @property
    def _is_apart(self) -> bool:
        """Return whether the model that is trained is not the one that is written."""
        machine = self.config.machine
        return (
            self.item.view is not None
            or machine.sharded
            or machine.experts_over > 1
            or self.config.adapting.four_bit
        )

    def _place(self) -> Any:
        """Return the device of this process."""
        import torch

        found = torch.accelerator.current_accelerator(check_available=True)
        if self.device == "cpu" or found is None:
            return torch.device("cpu")
        return torch.device(found.type, torch.accelerator.current_device_index())

    def _loaded(self) -> Any:
        """Return the model in its stored dtype; split over the processes where asked for."""
        machine, spread = self.config.machine, {}
        if machine.sharded or machine.experts_over > 1:
            from transformers.distributed import DistributedConfig

            shares = {"ep_size": machine.experts_over} if machine.experts_over > 1 else {}
            layout: Any = DistributedConfig(fsdp_size=self.group.size, **shares)
            spread["distributed_config"] = layout
        return load_model(self.item.source.root, **self.changed, **spread)

    def _whole(self, state: Mapping[str, Any]) -> tuple[Any, Ready]:
        """Return the whole model with what was trained, ready to be saved."""
        from adaconvert.train.prepare import prepare
        from adaconvert.train.shards import restore

        model: Any = load_model(self.item.source.root, **self.changed)
        adapting = replace(self.config.adapting, four_bit=False)
        ready = prepare(model, replace(self.config, adapting=adapting, machine=Machine()))
        restore(model, state)
        return model, ready

    def _save(self, model: Any, ready: Any) -> None:
        from adaconvert.train.adapt import merge
        from adaconvert.train.checkpoints import refusing

        model.to("cpu")
        if ready.tuner is not None:
            merge(model, ready.tuner, keep_wide=self.config.dtype == "float32")
        with refusing(self.work, TRAINED):
            model.save_pretrained(self.work.path / TRAINED, max_shard_size="2GB")

    def _save_adapters(self, state: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        from adaconvert.train.checkpoints import refusing

        with refusing(self.work, TRAINED):
            (self.work.path / TRAINED).mkdir()
            save_file(dict(state), self.work.path / TRAINED / ADAPTER_WEIGHTS)

    def _prepare(self, model: Any) -> Meter | None:
        """Set selection, recomputation and penalty; return what watches activations."""
        from adaconvert.train.prepare import set_selection
        from adaconvert.train.sparsify import Meter, attach, replaced

        config = self.config
        set_selection(model, config)
        if config.checkpointing:
            _recompute(model)
        if not config.sparsity.watches:
            return None
        meter = Meter(config.sparsity)
        attach(model, self.item.spec, meter, replaced(self.item.spec, config.sparsity))
        return meter

    def _trainer(
        self,
        model: Any,
        chosen: Chosen,
        meter: Meter | None,
        routing: Prepared,
        exits: ExitTraining | None,
        depth: DepthTraining | None,
    ) -> FinetuneTrainer:
        from transformers import TrainerCallback, default_data_collator

        from adaconvert.train.checkpoints import ResumableTrainer

        saves = self.config.save_steps

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
                # a checkpoint has brought those of the run it is of
                state.compute_steps(args, state.max_steps)
                trainer.start_clock()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                # sums that a checkpoint would lose are said before it is written
                saved = bool(saves) and state.global_step % saves == 0
                control.should_log |= saved or state.global_step == state.max_steps

        args = arguments_of(
            *(self.config, self.work.path),
            device=self.device,
            is_adaptive=self.item.spec.adaptive is not None,
        )
        trainer = ResumableTrainer(
            work=self.work,
            group=self.group,
            config=self.config,
            routers=chosen.routers,
            meter=meter,
            watch=routing.routers,
            exits=exits,
            depth=depth,
            flops=self._flops(chosen, args),
            teacher=self._teacher(args.device),
            report=self.report,
            model=model,
            args=args,
            train_dataset=self.data,
            data_collator=default_data_collator,
            callbacks=[Callback()],
        )
        self.validator.register(trainer)
        log_into(trainer, self.logs)
        return trainer

    def _flops(self, chosen: Chosen, args: Any) -> tuple[float, float] | None:
        if args.use_cpu:
            return None
        trained = chosen.trained / max(chosen.trained + chosen.frozen, 1)
        return utilisation(self.item, self.config, trained)

    def _teacher(self, device: Any) -> Any:
        """Return the dense teacher on the device of the student, None without distillation."""
        from adaconvert.modeling import stock_experts
        from adaconvert.modeling.adaptive_schema import routed_layers, routed_specs
        from adaconvert.train.prepare import set_precision

        if not (self.config.distill or self.config.distill_hidden):
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
        ours, theirs = ((s.layers, s.hidden) for s in (self.item.spec, source.spec))
        if self.config.distill_hidden and ours != theirs:
            raise OptionError(
                "has other hidden states",
                where="--teacher",
                expected=f"{ours[0]} layers of width {ours[1]} for --distill-hidden",
                found=f"{theirs[0]} of width {theirs[1]}",
            )
        teacher: Any = load_model(source.source.root, device=str(device))
        if source.spec.adaptive is not None and routed_specs(source.spec.adaptive):
            teacher.set_select("all")
        if routed_layers(source.spec.adaptive or {}):
            teacher.set_depth("all")
        teacher.requires_grad_(False)
        set_precision(teacher, self.config.precision)
        stock_experts.use(teacher)
        return teacher


def _recompute(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        # the only name transformers 5.17 has
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
