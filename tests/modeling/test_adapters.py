"""What routed adapters of standalone checkpoints compute, against a plain loop over adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaconvert.modeling.adaptive_adapters import uniform_lora
from adaconvert.modeling.adaptive_linear import block_of
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adapters_looped import RULES, Looped

EPS = torch.finfo(torch.float64).eps
#: what a norm of logits may differ by: sums of float64 numbers in another order, through two
#: blocks that make them larger.
CLOSE = 2**10 * EPS
FAMILIES = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo"),
    *("olmo2", "olmo3", "granite", "smollm3", "gpt2", "gpt_neox", "bert", "mixtral", "qwen2_moe"),
    *("granitemoe", "deepseek_v2", "glm4_moe"),
]
Adapt = Any


def dense_of(folder: Path) -> Path:
    return folder.parent / "dense"


def ids_of(rows: int = 2, length: int = 13) -> Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(0))


def assert_close(found: Tensor, expected: Tensor, close: float = CLOSE) -> None:
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= close * expected.norm()


def by_hand(folder: Path, select: Any = None) -> Looped:
    return Looped(dense_of(folder), folder, select)


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="lora", marks=pytest.mark.smoke),
        pytest.param({"share": "a"}, id="shared-a"),
        pytest.param({"scaling": [0.5, 1.0, 2.0, 4.0]}, id="scaling-of-each"),
        pytest.param({"kind": "ia3"}, id="ia3"),
        pytest.param({"kind": "ia3", "on": "input"}, id="ia3-input"),
    ],
)
def test_every_rule_computes_what_a_loop_over_adapters_does(
    adapt: Adapt, reads: str, options: dict[str, Any]
) -> None:
    folder = adapt(reads=reads, **options)
    model: Any = load_model(folder, dtype="float64")
    ids, seen = ids_of(), []
    with torch.no_grad():
        for rule in RULES.values():
            with model.set_adapters(**rule):
                seen.append(model(ids).logits)
                assert_close(seen[-1], by_hand(folder, rule).model(ids).logits)
        stored = model(ids).logits
    assert torch.equal(stored, seen[0])
    assert torch.equal(stored, model(ids).logits)
    found = dict(zip(RULES, seen, strict=True))
    # all of them selected is soft
    assert_close(found.pop("top-4"), found["soft"])
    assert len({float(logits.sum()) for logits in found.values()}) == len(found)


def linears_of(family: str) -> tuple[str, ...]:
    """Return the last names of a family's linears, the head left out."""
    model = tiny_models.build(family, tiny_models.config_values(family))
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    return tuple({p.rpartition(".")[2] for p in paths if block_of(p) is not None})


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_that_are_zero_change_no_bit_of_any_family(adapt: Adapt, family: str) -> None:
    folder = adapt(family, linears=linears_of(family), random=False, reads="layer")
    model: Any = load_model(folder, dtype="float32")
    dense: Any = load_model(dense_of(folder), dtype="float32")
    assert len(model.adaptive_adapters()) >= 4
    with torch.no_grad():
        wanted = dense(ids_of()).logits
        for rule in RULES.values():
            with model.set_adapters(**rule):
                assert torch.equal(model(ids_of()).logits, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_a_loop_does(adapt: Adapt, family: str) -> None:
    folder = adapt(family, linears=linears_of(family), reads="shared")
    # products of stacked experts know no float64
    model: Any = load_model(folder, dtype="float64", experts_implementation="eager")
    with torch.no_grad():
        assert_close(model(ids_of()).logits, by_hand(folder).model(ids_of()).logits)


def test_uniform_gates_are_one_plain_adapter(adapt: Adapt) -> None:
    folder = adapt(scaling=[0.5, 1.0, 2.0, 4.0])
    model: Any = load_model(folder, dtype="float64")
    plain: Any = load_model(dense_of(folder), dtype="float64")
    for path, site in model.adaptive_adapters().items():
        a, b = uniform_lora(site.adapters.a, site.adapters.b, site.adapters.scaling)
        assert a.shape[0] == b.shape[1] == 8
        plain.get_submodule(path).weight.data += b @ a
    with torch.no_grad(), model.set_adapters("uniform"):
        assert_close(model(ids_of()).logits, plain(ids_of()).logits)


def test_one_adapter_is_a_plain_one_under_every_rule_but_sigmoid(adapt: Adapt) -> None:
    folder = adapt(experts=1, rank=3)
    model: Any = load_model(folder, dtype="float64")
    plain: Any = load_model(dense_of(folder), dtype="float64")
    for path, site in model.adaptive_adapters().items():
        plain.get_submodule(path).weight.data += 2 * site.adapters.b[0] @ site.adapters.a[0]
    with torch.no_grad():
        for rule in ({"rule": "soft"}, {"rule": "top-k", "k": 1}, {"rule": "top-p", "p": 0.3}):
            with model.set_adapters(**rule):
                assert_close(model(ids_of()).logits, plain(ids_of()).logits)
        with model.set_adapters("sigmoid"):
            assert (model(ids_of()).logits - plain(ids_of()).logits).norm() > 0.1


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
@pytest.mark.parametrize("options", [{}, {"share": "a"}, {"kind": "ia3"}])
def test_gradients_are_those_of_the_loop(adapt: Adapt, reads: str, options: dict[str, Any]) -> None:
    folder = adapt(reads=reads, **options)
    model: Any = load_model(folder, dtype="float64").double()
    for rule in ("soft", "top-2", "top-p-renormalized"):
        with model.set_adapters(**RULES[rule]):
            found = gradients(model, ids_of())
        wanted = by_hand(folder, RULES[rule]).gradients(ids_of())
        ours = {n: g for n, g in found.items() if ".adapters." in n or ".router." in n}
        assert set(ours) == set(wanted)
        for name, value in ours.items():
            assert_close(value, wanted[name], 2**14 * EPS)


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
def test_a_first_step_moves_nothing_but_b(adapt: Adapt, reads: str) -> None:
    model: Any = load_model(adapt(reads=reads, random=False), dtype="float32")
    found = gradients(model, ids_of())
    for name, value in found.items():
        if ".router." in name or name.endswith("adapters.a"):
            assert not value.any()
        elif name.endswith("adapters.b"):
            assert value.any()
