"""What the compute knob refuses, and classes that cannot generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.errors import OptionError
from adaconvert.evaluate.settings import check_settings, settings_of
from adaconvert.modeling import modeling_adaptive
from adaconvert.modeling.adaptive_knobs import knobs_for
from adaconvert.modeling.adaptive_masks import seen_lengths
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("limits")

    def get(family: str, **values: Any) -> Path:
        adaptive = root / f"{family}-adaptive"
        if not adaptive.exists():
            make_adaptive(tiny_models.make(family, root / family, **values), adaptive)
        return adaptive

    return get


@pytest.mark.parametrize("compute", [1.5, 50])
def test_more_than_the_reference_is_refused(folder: Any, compute: float) -> None:
    model: Any = load_model(folder("llama"))
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="expected a fraction above 0 and up to 1"):
        model.set_compute(compute)
    with pytest.raises(ValueError, match="expected a fraction above 0 and up to 1"):
        model.generate(ids, max_new_tokens=1, compute=compute)
    with pytest.raises(OptionError, match=r"--set-compute: .*up to 1"):
        check_settings(settings_of(compute, ()), model)
    with model.set_compute(1 + 1e-12):
        assert model._adaptive_knobs == {"*": {"rule": "all"}}, "rounding is no more"


def test_every_row_of_a_table_is_within_reach() -> None:
    rows = [{"compute": 0.9, "select": {}}, {"compute": 1.02, "select": {"*": {"rule": "all"}}}]
    adaptive = {"calibration": {"rows": rows}}
    assert knobs_for(adaptive, 1.02) == {"*": {"rule": "all"}}
    with pytest.raises(ValueError, match=r"above 0 and up to 1\.02"):
        knobs_for(adaptive, 1.1)


def test_only_what_generates_says_so() -> None:
    masked: Any = modeling_adaptive.AdaptiveBertForMaskedLM
    causal: Any = modeling_adaptive.AdaptiveLlamaForCausalLM
    assert not hasattr(masked, "generate")
    assert not masked.can_generate()
    assert causal.can_generate()


def test_attention_in_static_windows_is_counted_as_in_growing_ones(folder: Any) -> None:
    model: Any = load_model(folder("olmo3", layer_types=["sliding_attention"] * 2))
    ids = torch.arange(3, 31).reshape(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    counts = {}
    for cache in ("dynamic", "static"):
        with torch.no_grad(), model.account() as account:
            model.generate(ids, attention_mask=mask, cache_implementation=cache, **options)
        counts[cache] = (account.tokens, account.attention_flops)
    assert counts["static"] == counts["dynamic"]


def test_masks_of_a_window_say_what_is_seen() -> None:
    last = torch.ones(2, 1, dtype=torch.bool)
    window = torch.tensor([[[[False, True, True]]], [[[True, True, True]]]])
    assert seen_lengths(last, window, 9, causal=True).tolist() == [[2], [3]]
