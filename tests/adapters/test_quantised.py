"""A frozen base in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training

from adaconvert.adapters import MoloraLinear, set_routing
from adaconvert.errors import OptionError
from adaconvert.testing.adapters_in_peft import attach, logits_of

pytest.importorskip("bitsandbytes")
Bases = Callable[..., Path]
#: packed matrices come in runs of 64.
SIZES = {"hidden_size": 64, "intermediate_size": 128}
IDS = {"input_ids": torch.arange(5, 45).reshape(2, 20)}


def packed(base: Path, bits: int) -> Any:
    """Return a base with packed linears."""
    import transformers

    options: dict[str, Any] = {f"load_in_{bits}bit": True}
    if bits == 4:
        options["bnb_4bit_compute_dtype"] = torch.float32
    config = transformers.BitsAndBytesConfig(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config)


def ready(model: Any) -> Any:
    """Return a packed base that can be trained around."""
    return prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )


@pytest.fixture(params=[4, 8])
def bits(request: pytest.FixtureRequest) -> int:
    """Return how many bits a weight has."""
    return int(request.param)


@pytest.mark.parametrize("reads", ["module", "layer"])
def test_a_packed_base_is_adapted_trained_and_reloaded(
    base_of: Bases, tmp_path: Path, bits: int, reads: str
) -> None:
    base = base_of("llama", **SIZES)
    dense = packed(base, bits).eval()
    want = logits_of(dense, **IDS)
    model = attach(ready(dense), seed=None, router={"reads": reads})
    assert (logits_of(model, **IDS) - want).norm() <= 1e-2 * want.norm()
    layer = next(module for module in model.modules() if isinstance(module, MoloraLinear))
    assert not layer.base_layer.weight.is_floating_point()
    assert layer.molora_A["default"].dtype.is_floating_point
    model.train()(**IDS, labels=IDS["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            assert parameter.grad is not None
            parameter.data -= 0.1 * parameter.grad
    model.eval()
    trained = logits_of(model, **IDS)
    assert not torch.equal(trained, want)
    model.save_pretrained(tmp_path / "saved")
    assert model.peft_config["default"].base_fingerprint is None
    fresh = ready(packed(base, bits))
    again: Any = PeftModel.from_pretrained(fresh, tmp_path / "saved").eval()
    assert torch.equal(logits_of(again, **IDS), trained)


def test_an_adapter_of_a_whole_base_runs_on_a_packed_one_and_is_not_merged(
    base_of: Bases, tmp_path: Path, bits: int, recwarn: pytest.WarningsRecorder
) -> None:
    base = base_of("llama", **SIZES)
    whole = attach(base)
    whole.save_pretrained(tmp_path / "saved")
    model: Any = PeftModel.from_pretrained(packed(base, bits), tmp_path / "saved").eval()
    assert not [one for one in recwarn if "another base" in str(one.message)]
    kept = model.peft_config["default"].base_fingerprint
    assert kept == whole.peft_config["default"].base_fingerprint
    assert bool(logits_of(model, **IDS).isfinite().all())
    set_routing(model, "uniform")
    with pytest.raises(OptionError, match=r"the base is quantised\. Load the base without"):
        model.merge_and_unload()
