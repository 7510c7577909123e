"""Trains one LoRA adapter with PEFT and transformers' Trainer, as people do without adaconvert.

    python scripts/train_lora.py MODEL OUT --data a.jsonl [--data b.jsonl ...] --tokens 65536

Documents are packed into sequences of --seq-len tokens, taken from the texts in turn and in a
seeded order. OUT is a PEFT adapter folder; OUT/training.json tells what it was trained on.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import click
import torch

#: the linears of a Llama block.
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, help=".jsonl with `text`; may be repeated")
@click.option("--tokens", default=65536, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--alpha", type=float, help="[default: twice the rank]")
@click.option("--targets", default=TARGETS, show_default=True)
@click.option("--seq-len", default=256, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--lr", default=3e-4, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    model: Path, out: Path, data: tuple[str, ...], tokens: int, seed: int, **options: Any
) -> None:
    """Train it and write it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    torch.manual_seed(seed)
    length, batch = options["seq_len"], options["batch_size"]
    steps = tokens // (length * batch)
    rows = sequences(AutoTokenizer.from_pretrained(model), data, length, steps * batch, seed)
    rank, alpha = options["rank"], options["alpha"] or 2 * options["rank"]
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=options["targets"].split(","),
            task_type="CAUSAL_LM",
        ),
    )
    arguments = TrainingArguments(
        output_dir=str(out.with_name(f"{out.name}.trainer")),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=options["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=max(steps // 20, 1),
        logging_steps=8,
        save_strategy="no",
        report_to=[],
        bf16=True,
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
    )
    began = time.monotonic()
    Trainer(model=adapted, args=arguments, train_dataset=rows).train()
    taken = time.monotonic() - began
    adapted.save_pretrained(out)
    told = {**options, "alpha": alpha, "data": [Path(where).name for where in data]}
    told |= {"tokens": steps * batch * length, "seed": seed, "seconds": round(taken, 1)}
    (out / "training.json").write_text(json.dumps(told, indent=2))


def sequences(
    tokenizer: Any, data: tuple[str, ...], length: int, count: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Return `count` packed sequences, from every text the same number, in a seeded order."""
    draw, found = random.Random(seed), []
    share = -(-count // len(data))
    for where in data:
        lines = Path(where).read_text(encoding="utf-8").splitlines()
        draw.shuffle(lines)
        ids: list[int] = []
        for line in lines:
            ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= share * length:
                break
        if len(ids) < share * length:
            raise click.UsageError(f"{where} has {len(ids)} tokens, {share * length} are wanted")
        found += [ids[i * length : (i + 1) * length] for i in range(share)]
    draw.shuffle(found)
    rows = [torch.tensor(row) for row in found[:count]]
    return [{"input_ids": row, "labels": row} for row in rows]


if __name__ == "__main__":
    main()
