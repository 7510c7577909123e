"""Which base an adapter was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaconvert.adapters.config import MoloraConfig
from adaconvert.errors import SourceError
from adaconvert.io import fingerprint
from adaconvert.io.source import Source
from adaconvert.modeling.loading import load_model
from adaconvert.testing.adapters_in_peft import attach

Bases = Callable[..., Path]
LLAMA = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
GPT2 = [f"transformer.h.{layer}.attn.c_attn" for layer in (0, 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("family", "paths"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_memory_and_checkpoint_agree(
    base_of: Bases, family: str, paths: list[str], dtype: str
) -> None:
    base = base_of(family, dtype=dtype)
    model: Any = load_model(base)
    found = fingerprint.of_model({path: model.get_submodule(path) for path in paths})
    source = Source.open(base)
    names = {path: f"{path}.weight" for path in paths}
    assert fingerprint.of_source(source, names) == found
    # the order they are given in does not matter
    assert fingerprint.of_source(source, dict(reversed(names.items()))) == found
    assert attach(base, target_modules=paths).peft_config["default"].base_fingerprint == found


def test_it_is_the_documented_digest(base_of: Bases) -> None:
    model: Any = load_model(base_of("llama"))
    digest = hashlib.sha256()
    for path in LLAMA:
        row = model.get_submodule(path).weight[0].detach().to(torch.bfloat16)
        digest.update(path.encode() + b"\0" + row[:64].view(torch.int16).numpy().tobytes())
    found = fingerprint.of_model({path: model.get_submodule(path) for path in LLAMA})
    assert found == digest.hexdigest()


def test_no_more_than_64_values_count() -> None:
    linear = nn.Linear(70, 3)
    before = fingerprint.of_model({"a": linear})
    with torch.no_grad():
        linear.weight[0, 64:] += 1
        linear.weight[1] += 1
        assert fingerprint.of_model({"a": linear}) == before
        linear.weight[0, 63] += 1
    assert fingerprint.of_model({"a": linear}) != before


def test_what_has_no_values_has_no_fingerprint() -> None:
    linear = nn.Linear(4, 3)
    assert fingerprint.of_model({}) is None
    assert fingerprint.of_model({"a": linear.to("meta")}) is None
    packed = nn.Linear(4, 3)
    packed.weight = nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)
    assert fingerprint.of_model({"a": packed}) is None


@pytest.mark.parametrize("name", ["absent.weight", "model.norm.weight"])
def test_a_weight_that_cannot_be_read(base_of: Bases, name: str) -> None:
    with pytest.raises(SourceError, match="the weight of 'a' cannot be read; expected a matrix"):
        fingerprint.of_source(Source.open(base_of("llama")), {"a": name})


def test_another_base_another_fingerprint(base_of: Bases) -> None:
    configs: list[MoloraConfig] = [
        attach(base_of("llama", seed=seed), target_modules=["q_proj"]).peft_config["default"]
        for seed in (0, 7)
    ]
    assert configs[0].base_fingerprint != configs[1].base_fingerprint
