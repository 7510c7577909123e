"""What transformers' Trainer is told of a fine-tune, and what its failures mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaconvert.errors import ResourceError
from adaconvert.train.config import FinetuneConfig


def arguments_of(config: FinetuneConfig, folder: Path, *, device: str, is_adaptive: bool) -> Any:
    """Return the `TrainingArguments` of a fine-tune.

    Args:
        config: the fine-tune.
        folder: where checkpoints go.
        device: "auto", "cpu" or an accelerator's name.
        is_adaptive: some parameters may take no part in a step.
    """
    from transformers import TrainingArguments

    falling = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    layout: dict[str, Any] = {"torch_compile": True} if config.machine.compiled else {}
    if config.machine.sharded or config.machine.experts_over > 1:
        # Trainer does not know how to save the rest of split models; `ResumableTrainer` does
        layout |= {"save_only_model": True}
    if config.optimizer == "sgd":
        layout |= {"optim": "sgd"}
    args = TrainingArguments(
        output_dir=str(folder),
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
        use_cpu=device == "cpu" or not has_accelerator(),
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 1,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=is_adaptive,
        # buffers are the same in every process
        ddp_broadcast_buffers=False,
        **layout,
    )
    if args.n_gpu > 1:
        # several devices are torchrun's business; alone Trainer would copy the model to each
        args._n_gpu = 1
    return args


def has_accelerator() -> bool:
    """Return whether torch sees an accelerator."""
    import torch

    return bool(torch.accelerator.is_available())


@contextmanager
def explained(config: FinetuneConfig, hint: Callable[[], str]) -> Iterator[None]:
    """Say what to change when memory runs out or the model cannot be compiled in the body.

    Args:
        config: the fine-tune.
        hint: says how to go on from there.

    Raises:
        ResourceError: it did, or could not.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise ResourceError(
                "out of memory while training", hint=f"{_lower(config)} {hint()}"
            ) from error
        home = type(error).__module__
        if config.machine.compiled and home.startswith(("torch._dynamo", "torch._inductor")):
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            raise ResourceError(
                f"torch cannot compile this model here ({first.strip()})",
                where="--compile",
                hint="Leave --compile out.",
            ) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, whoever says it."""
    named = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    return named or isinstance(error, MemoryError)


def _lower(config: FinetuneConfig) -> str:
    """Return what would need less, the least intrusive first."""
    ways = []
    if config.batch_size > 1:
        ways.append(f"a lower --batch-size (now {config.batch_size}) with a higher --accumulate")
    if not config.checkpointing:
        ways.append("--checkpointing")
    ways.append(f"a lower --seq-len (now {config.seq_len})")
    if not config.adapting.rank:
        ways.append("--lora 8")
    return f"Give {', or '.join(ways)}; --dry-run says what each needs."
