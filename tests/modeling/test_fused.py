"""Networks that keep gate and up in one matrix: the parts that are taken from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from adaconvert.modeling import adaptive_ffn
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("phi3", tmp_path_factory.mktemp("fused") / "phi3")


def other_memory(weight: Any) -> None:
    """Other numbers in other memory, as merging an adapter safely does."""
    weight.data = weight.data + 1


def moved(weight: Any) -> None:
    """Nothing but memory changes, as `.to` does, forth and back."""
    weight.data = weight.data.clone()


@pytest.mark.parametrize("change", [other_memory, moved])
def test_decoding_follows_a_matrix_that_gets_other_memory(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    model: Any = load_model(make_adaptive(dense, tmp_path / "adaptive"), dtype="float32")
    seen: list[Any] = []

    def step(x: Any, decoder: Any, rule: str, number: float) -> None:
        seen.append(decoder.weights)

    monkeypatch.setattr(adaptive_ffn, "run_routed", step)
    path, site = next(iter(model.adaptive_sites().items()))
    x = torch.ones(1, 1, site.adaptive_spec["hidden"])
    weight = site.gate_up_proj.weight
    with torch.no_grad(), model.set_select("top-k", k=2):
        for _ in range(2):
            site._routed(adaptive_ffn.current(), {"rule": "top-k", "k": 2}, x)
        change(weight)
        site._routed(adaptive_ffn.current(), {"rule": "top-k", "k": 2}, x)
    assert seen[0] is seen[1], f"{path} is taken apart once"
    gate, up = weight.chunk(2)
    assert (seen[2].gate.data_ptr(), seen[2].up.data_ptr()) == (gate.data_ptr(), up.data_ptr())
    assert torch.equal(seen[2].gate, gate)


def test_an_adapter_that_goes_leaves_decoding_as_it_was(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    model: Any = load_model(make_adaptive(dense, tmp_path / "adaptive"), dtype="float32")
    seen: list[Any] = []
    monkeypatch.setattr(adaptive_ffn, "run_routed", lambda *a: seen.append(a))
    token = torch.tensor([[5]])
    with model.set_select("top-k", k=2), torch.no_grad():
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
        adapted(token)
        assert not seen, "an adapter takes part"
        adapted.merge_and_unload()(token)
    assert len(seen) == len(model.adaptive_sites())


def test_the_gate_as_router_runs_up_no_more_than_is_counted(dense: Path, tmp_path: Path) -> None:
    folder = make_adaptive(dense, tmp_path / "adaptive", router="gate", experts=64)
    model: Any = load_model(folder, dtype="float32")
    ids = torch.arange(3, 15)[None]
    with (
        torch.no_grad(),
        model.set_select("top-k", k=32),
        model.account() as account,
        FlopCounterMode(display=False) as flops,
    ):
        model(ids)
    spent = sum(site.executed_flops for site in account.sites.values())
    found = flops.get_flop_counts()
    own = sum(sum(found[f"AdaptivePhi3ForCausalLM.{path}"].values()) for path in account.sites)
    assert own == spent


@pytest.mark.parametrize("change", [other_memory, moved])
def test_several_tokens_follow_a_matrix_that_gets_other_memory(
    dense: Path, tmp_path: Path, change: Any
) -> None:
    folder = make_adaptive(dense, tmp_path / "adaptive")
    model: Any = load_model(folder, dtype="float32")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), model.set_select("top-k", k=2):
        model(ids)
        for site in model.adaptive_sites().values():
            change(site.gate_up_proj.weight)
        found = model(ids).logits
    other: Any = load_model(folder, dtype="float32")
    for site in other.adaptive_sites().values():
        change(site.gate_up_proj.weight)
    with torch.no_grad(), other.set_select("top-k", k=2):
        assert torch.equal(found, other(ids).logits)


class Turned(torch.nn.Module):
    """A parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the rows in the other order."""
        return weight.flip(0)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_router_that_is_parametrised_later_is_followed(
    dense: Path, tmp_path: Path, tokens: int
) -> None:
    folder = make_adaptive(dense, tmp_path / "adaptive")
    ids = torch.arange(3, 3 + tokens)[None]
    found = []
    for used in (True, False):
        model: Any = load_model(folder, dtype="float32")
        with torch.no_grad(), model.set_select("top-k", k=2):
            if used:
                model(ids)
            for site in model.adaptive_sites().values():
                parametrize.register_parametrization(site.router, "weight", Turned())
            found.append(model(ids).logits)
    assert torch.equal(*found)


def test_a_network_that_is_split_otherwise_runs_as_split(dense: Path, tmp_path: Path) -> None:
    folders = [make_adaptive(dense, tmp_path / str(n), router="gate", experts=n) for n in (16, 64)]
    coarse, fine = (load_model(folder, dtype="float32") for folder in folders)
    model: Any = coarse
    sites = model.adaptive_sites()
    wanted: Any = fine
    for ids in (torch.arange(3, 12)[None], torch.tensor([[5]])):
        with torch.no_grad():
            for own in (True, False):
                for path, other in wanted.adaptive_sites().items():
                    kept = sites[path].adaptive_spec
                    sites[path].adaptive_spec = kept if own else other.adaptive_spec
                with model.set_select("top-k", k=8):
                    found = model(ids).logits
            with wanted.set_select("top-k", k=8):
                assert torch.equal(found, wanted(ids).logits)
