"""Forward passes of routed adapters under PEFT that are mixed in precision, broken or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.errors import OptionError
from adaconvert.modeling.loading import load_model
from adaconvert.testing.adapters_in_peft import attach, logits_of

Bases = Callable[..., Path]
TOP_2 = {"rule": "top-k", "k": 2, "renormalize": True}
OTHER = {"input_ids": torch.arange(40, 68).reshape(2, 14)}
#: of bfloat16, through two blocks, as a share of the norm of the logits.
CLOSE = 8 * torch.finfo(torch.bfloat16).eps


def mixed_of(model: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return logits_of(model).float()


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
def test_selected_adapters_under_autocast_are_near_those_of_float32(
    base_of: Bases, reads: str
) -> None:
    model = attach(base_of("llama"), router={"reads": reads}, select=TOP_2, scaling=0.2)
    wide, mixed = logits_of(model), mixed_of(model)
    assert bool(mixed.isfinite().all())
    assert (mixed - wide).norm() <= CLOSE * wide.norm()
    with model.disable_adapter():
        assert (mixed - mixed_of(model)).norm() > 3 * CLOSE * wide.norm()


@pytest.mark.parametrize("inputs", [None, ["down_proj"]], ids=["outputs", "some inputs"])
def test_vectors_that_scale_act_under_autocast(base_of: Bases, inputs: list[str] | None) -> None:
    model = attach(base_of("llama"), experts_kind="ia3", feedforward_modules=inputs)
    wide, mixed = logits_of(model), mixed_of(model)
    plain = mixed_of(load_model(base_of("llama")))
    assert bool(mixed.isfinite().all())
    assert (mixed - plain).norm() > 4 * (mixed - wide).norm()
    assert (mixed - plain).norm() > CLOSE * plain.norm()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("reads", ["layer", "shared"])
def test_a_pass_broken_off_in_a_block_leaves_no_logits_of_its_router(
    base_of: Bases, reads: str, error: type[BaseException]
) -> None:
    model = attach(base_of("llama"), router={"reads": reads}, select=TOP_2)
    fresh = attach(base_of("llama"), router={"reads": reads}, select=TOP_2)

    def stop(*_: Any) -> None:
        raise error

    inner = model.get_base_model().model.layers[1]
    hook = inner.mlp.register_forward_pre_hook(stop)
    for _ in range(2):
        with pytest.raises(error):
            model(**OTHER)
    hook.remove()
    with pytest.raises(RuntimeError, match="called outside the block"):
        inner.self_attn.q_proj(torch.zeros(1, 3, 32))
    assert torch.equal(logits_of(model), logits_of(fresh))


def test_sets_by_sequence_are_refused_and_the_next_pass_is_as_before(base_of: Bases) -> None:
    model = attach(base_of("llama"))
    want = logits_of(model)
    with pytest.raises(OptionError, match=r"adapter_names: gives sequences .* one batch per set"):
        model(**OTHER, adapter_names=["default", "__base__"])
    with pytest.raises(OptionError, match="adapter_names"):
        model.generate(**OTHER, adapter_names=["default", "default"], max_new_tokens=1)
    assert torch.equal(logits_of(model), want)
