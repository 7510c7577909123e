"""How routed low-rank adapters are called: refusals, and which form runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.kernels.lora import choose_form, grouped_lora
from adaconvert.kernels.plan import route_plan


def run(width: int = 16, **changed: Any) -> Tensor:
    given = {
        **{"x": torch.randn(6, width), "weights_of": torch.rand(6, 2)},
        **{"a": torch.randn(4, 8, width), "b": torch.randn(4, 24, 8)},
        **{"base_out": None, "scaling": 1.0},
        **changed,
    }
    plan = route_plan(torch.rand(6, 4).topk(2).indices, 4)
    first = (given.pop("x"), given.pop("base_out"), plan, given.pop("weights_of"))
    return grouped_lora(*first, **given)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("x", (6, 15)), ("weights_of", (6, 3)), ("a", (3, 8, 16)), ("b", (4, 24, 7))],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{name} is \[{', '.join(map(str, shape))}\]; expected"):
        run(**{name: torch.randn(shape)})


def test_what_does_not_fit_is_refused() -> None:
    assert run().shape == (6, 24)
    for words, changed in {
        "base_out is": {"base_out": torch.randn(6, 23)},
        "scaling is": {"scaling": torch.ones(3)},
        "one matrix per adapter": {"a": torch.randn(8, 16)},
        "form 'some'": {"form": "some"},
        "backend 'some'": {"backend": "some"},
        "grouped_mm cannot run this: sizes": {
            **{"width": 15, "form": "sorted", "backend": "grouped_mm"}
        },
    }.items():
        with pytest.raises(ValueError, match=words):
            run(**changed)  # type: ignore[arg-type]


def test_forms_by_what_is_selected() -> None:
    def chosen(tokens: int, slots: int, experts: int, rank: int, outputs: int = 64) -> str:
        plan = route_plan(torch.zeros(tokens, slots, dtype=torch.long), experts)
        a, b = torch.empty(experts, rank, 8), torch.empty(experts, outputs, rank)
        form, reason = choose_form(plan, torch.empty(tokens, 8), a, b)
        assert f"{slots} of {experts}" in reason
        return form

    assert chosen(512, 2, 8, 16) == chosen(512, 2, 64, 16) == chosen(1, 8, 8, 16) == "sorted"
    assert chosen(512, 4, 8, 16) == chosen(512, 8, 8, 16) == chosen(512, 1, 4, 4) == "all"
    # the same adapters on outputs that leave the cache
    assert (chosen(2048, 2, 8, 16, 1536), chosen(2048, 2, 8, 16, 8192)) == ("sorted", "all")
    assert chosen(2048, 2, 64, 16, 8192) == "sorted"
