"""Losses of adapter folders on held-out text, computed with PEFT and transformers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

Losses = dict[str, tuple[int, float]]


def cut(where: Path, characters: int) -> list[str]:
    """Return the beginning of every document of a text."""
    lines = where.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"][:characters] for line in lines]


def losses_of(
    base: Path, adapter: Path | None, texts: Mapping[str, list[str]]
) -> dict[str, Losses]:
    """Return, by text, document -> predicted tokens and mean loss in nats, in float32.

    Args:
        base: dense checkpoint.
        adapter: PEFT folder, None for the dense model.
        texts: name -> documents.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import adaconvert.auto  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    found: dict[str, Losses] = {}
    for name, documents in texts.items():
        found[name] = {
            f"{name}/{index}": loss_of(model, tokenizer, text)
            for index, text in enumerate(documents)
        }
    return found


@torch.inference_mode()
def loss_of(model: Any, tokenizer: Any, text: str) -> tuple[int, float]:
    """Return predicted tokens and mean loss of one document."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids).logits[0, :-1].float()
    return ids.shape[1] - 1, float(functional.cross_entropy(logits, ids[0, 1:]))
