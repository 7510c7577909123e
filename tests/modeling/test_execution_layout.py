"""Matrices laid out for decoding: values and everything that looks at them stay."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from adaconvert.modeling import adaptive_layout
from adaconvert.modeling.adaptive_execution import ExpertWeights, pack, prepare, run_experts
from adaconvert.modeling.adaptive_layout import check_rows, keep_rows, neuron_major, rows_of
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10, bias=False, dtype=dtype)
        self.down = nn.Linear(10, 6, dtype=dtype)


def pairs(net: Net) -> list[tuple[nn.Parameter, int]]:
    return [(net.up.weight, 0), (net.down.weight, 1)]


# -- copies by rows


def test_a_copy_is_the_matrix_by_rows_and_goes_with_it() -> None:
    net = Net()
    assert rows_of(net.down.weight) is None
    assert keep_rows(net.down.weight)
    assert not keep_rows(net.down.weight)
    rows = rows_of(net.down.weight)
    assert rows is not None
    assert torch.equal(rows, net.down.weight.t())
    assert rows.is_contiguous()
    assert list(net.state_dict()) == ["up.weight", "down.weight", "down.bias"]
    before = len(adaptive_layout._KEPT)
    del net, rows
    gc.collect()
    assert len(adaptive_layout._KEPT) == before - 1


def test_a_neuron_major_matrix_is_its_own_rows() -> None:
    rows = torch.randn(10, 6)
    found = rows_of(rows.t())
    assert found is not None
    assert found.data_ptr() == rows.data_ptr()


def grow(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


def replace(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2


def step(weight: nn.Parameter) -> None:
    weight.square().sum().backward()
    torch.optim.SGD([weight], lr=0.1).step()


@pytest.mark.parametrize("change", [grow, replace, step])
def test_a_changed_matrix_loses_its_copy(change: Any) -> None:
    net = Net()
    keep_rows(net.down.weight)
    change(net.down.weight)
    assert rows_of(net.down.weight) is None
    assert keep_rows(net.down.weight)


def test_a_change_through_data_is_noticed_when_many_tokens_run() -> None:
    """As adapters are merged: same memory, no version counted."""
    net = Net()
    weights = ExpertWeights(
        *(None, net.up.weight, net.down.weight, None, None, net.down.bias),
        *(torch.relu, 2),
    )
    keep_rows(net.down.weight)
    data = net.down.weight.data
    data += 1
    assert rows_of(net.down.weight) is not None
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[0, 0] = False
    with torch.no_grad():
        out, _ = run_experts(torch.randn(5, 6), weights, mask)
    assert out.shape == (5, 6)
    assert rows_of(net.down.weight) is None


def test_copies_are_not_taken_along() -> None:
    net = Net()
    keep_rows(net.down.weight)
    assert rows_of(copy.deepcopy(net).down.weight) is None


@pytest.mark.parametrize("why", ["meta", "subclass", "integer", "vector"])
def test_only_ordinary_matrices_are_copied(why: str) -> None:
    class Quantised(nn.Parameter):
        pass

    made = {
        "meta": lambda: nn.Parameter(torch.zeros(6, 10, device="meta")),
        "subclass": lambda: Quantised(torch.zeros(6, 10)),
        "integer": lambda: nn.Parameter(torch.zeros(6, 10, dtype=torch.int8), requires_grad=False),
        "vector": lambda: nn.Parameter(torch.zeros(6)),
    }
    assert not keep_rows(made[why]())


# -- re-laid in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_names_stay_and_the_layout_changes(dtype: torch.dtype) -> None:
    net = Net(dtype)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weight, hidden = net.down.weight, torch.randn(4, 10, dtype=dtype)
    out = net.down(hidden)
    assert pack(pairs(net), net) == 1
    assert net.down.weight is weight
    assert neuron_major(net.down.weight)
    assert not neuron_major(net.up.weight)
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    # the same products summed in another order
    limit = 1e-2 if dtype is torch.bfloat16 else 1e-5
    assert (net.down(hidden) - out).abs().max() <= limit * out.abs().max()
    assert pack(pairs(net), net) == 0


def test_what_is_packed_is_saved_and_trained_as_before(tmp_path: Path) -> None:
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    pack(pairs(net), net)
    contiguous = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    safetensors.torch.save_file(contiguous, tmp_path / "x.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in twin.state_dict().items())
    hidden = torch.randn(4, 10)
    for one in (net, twin):
        one.down(hidden).square().sum().backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
    # float32 sums of at most ten terms in another order
    assert (net.down.weight - twin.down.weight).abs().max() <= 1e-6
    fresh = Net()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.down.weight, net.down.weight)


def test_memory_that_someone_else_sees_is_left_alone() -> None:
    net = Net()
    net.other = nn.Linear(10, 6)
    net.other.weight.data = net.down.weight.data
    assert pack(pairs(net), net) == 0
    net = Net()
    net.register_buffer("part", net.down.weight.detach()[2])
    assert pack(pairs(net), net) == 0
    net = Net()
    # the same parameter under two names is one tensor, and stays one
    net.other = nn.Linear(10, 6)
    net.other.weight = net.down.weight
    assert pack(pairs(net), net) == 1
    assert net.other.weight is net.down.weight


def test_parts_of_one_buffer_that_do_not_overlap_are_packed() -> None:
    net = Net()
    whole = torch.randn(3, 60)
    net.register_buffer("above", whole[0])
    net.down.weight.data = whole[1].view(6, 10)
    assert pack(pairs(net), net) == 1
    assert torch.equal(net.down.weight, whole[1].view(6, 10))


@pytest.mark.parametrize("why", ["float16", "gradient", "meta", "subclass", "integer"])
def test_what_could_lose_something_is_left_alone(why: str) -> None:
    class Quantised(nn.Parameter):
        pass

    net = Net(torch.float16 if why == "float16" else torch.float32)
    if why == "gradient":
        net.down.weight.grad = torch.zeros(6, 10)
    elif why == "meta":
        net = net.to("meta")
    elif why == "subclass":
        net.down.weight = Quantised(net.down.weight.detach())
    elif why == "integer":
        net.down.weight = nn.Parameter(torch.zeros(6, 10, dtype=torch.int8), requires_grad=False)
    assert pack(pairs(net), net) == 0
    assert net.down.weight.stride() == (10, 1)


# -- whole models


@pytest.mark.parametrize("in_place", [False, True], ids=["copies", "in place"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_prepared_models_compute_and_save_the_same(
    tmp_path: Path, family: str, in_place: bool
) -> None:
    tiny_models.make(family, tmp_path / "dense")
    folder = make_adaptive(tmp_path / "dense", tmp_path / "adaptive")
    model, plain = load_model(folder, dtype="float32"), load_model(folder, dtype="float32")
    layers = len(model.adaptive_sites())
    # transformers' Conv1D has down by rows already, and only re-laying turns its up
    assert prepare(model, in_place=in_place) == (0 if family == "gpt2" and not in_place else layers)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for k, rows, length in ((8, 2, 9), (3, 2, 9), (2, 1, 1)):
            part = ids[:rows, :length]
            with model.set_select("top-k", k=k), plain.set_select("top-k", k=k):
                out, expected = model(part).logits, plain(part).logits
            # float32 sums in another order, through two layers
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.save_pretrained(tmp_path / "saved")
    for file in folder.glob("*.safetensors"):
        saved = safetensors.torch.load_file(tmp_path / "saved" / file.name)
        for name, value in safetensors.torch.load_file(file).items():
            assert torch.equal(saved[name], value), name


@pytest.mark.parametrize("part", [0, 3, 7])
def test_a_change_of_one_expert_through_data_is_noticed_when_many_tokens_run(part: int) -> None:
    """As the adapter of a single expert is merged."""
    down = nn.Parameter(torch.randn(96, 256))
    assert keep_rows(down)
    down.data[:, 32 * part : 32 * (part + 1)] += 1
    check_rows(down)
    assert rows_of(down) is None
