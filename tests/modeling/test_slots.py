"""The seams later methods use: slots inside and around a converted network, and composition."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaconvert.modeling import adaptive_schema, adaptive_slots
from adaconvert.modeling.adaptive_context import Call, current, entered, gathered
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive


class SkipEvery(nn.Module):
    """A layer slot that skips the tokens whose flat position is odd."""

    def adaptive_init(self, path: str, spec: Any) -> None:
        self.adaptive_layer = dict(spec)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.adaptive_layer["skip"] == "never":
            return super().forward(hidden_states, *args, **kwargs)
        out = super().forward(hidden_states, *args, **kwargs)
        keep = torch.arange(hidden_states.shape[1]) % 2 == 0
        return torch.where(keep[None, :, None], out, hidden_states)


def adapters(inputs: int, outputs: int) -> dict[str, Any]:
    """Return a linear slot with routed adapters."""
    sizes = {"count": 3, "rank": 1, "input": inputs, "output": outputs}
    reads = {"reads": "module", "score": "dot", "norm": "none", "scale": 1.0}
    return {
        "linear": {
            "adapters": {"kind": "lora", "share": None, "scaling": 1.0, **sizes},
            "router": {"kind": "linear", **reads},
            "select": {"rule": "soft"},
        }
    }


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adaptive_slots.SLOTS, "layer", SkipEvery)
    monkeypatch.setattr(adaptive_schema, "check_layer", lambda where, spec: None)


def build(tmp_path: Path, **sites: Any) -> tuple[Any, Any]:
    """Return a plain adaptive model, and one with more slots and the same weights."""
    dense = tiny_models.make("llama", tmp_path / "dense")
    plain: Any = load_model(make_adaptive(dense, tmp_path / "adaptive"), dtype="float32")
    config = copy.deepcopy(plain.config)
    config.adaptive["sites"].update(sites)
    other = type(plain)(config).eval()
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".adapters." in name or ".router." in name for name in missing)
    return plain, other


@pytest.mark.usefixtures("slots")
def test_wrapping_a_converted_network_keeps_its_tensor_names(tmp_path: Path) -> None:
    plain, other = build(tmp_path, **{"model.layers.0": {"layer": {"skip": "never"}}})
    assert set(other.state_dict()) == set(plain.state_dict())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), plain.set_select("top-k", k=3), other.set_select("top-k", k=3):
        assert torch.equal(other(ids).logits, plain(ids).logits)


@pytest.mark.usefixtures("slots")
def test_every_slot_at_once(tmp_path: Path) -> None:
    plain, other = build(
        tmp_path,
        **{
            "model.layers.0": {"layer": {"skip": "odd"}},
            "model.layers.0.mlp.up_proj": adapters(32, 64),
            "model.layers.1.self_attn.q_proj": adapters(32, 32),
        },
    )
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), other.set_select("top-k", k=3):
        before = other(ids).logits
        assert not torch.equal(before, plain(ids).logits)
        other.model.layers[0].mlp.up_proj.adapters.b.fill_(0.1)
        assert not torch.equal(other(ids).logits, before), "an adapter inside experts is run"
    assert isinstance(other.model.layers[0], SkipEvery)
    assert type(other.model.layers[0]).__name__ == "LlamaDecoderLayer"
    again = copy.deepcopy(other)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, other(ids).logits)


@pytest.mark.usefixtures("slots")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_wrapped_layers_are_still_checkpointed(tmp_path: Path, checkpointing: bool) -> None:
    _, model = build(tmp_path, **{"model.layers.0": {"layer": {"skip": "odd"}}})
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    passes: list[bool] = []

    def note(*_: Any) -> None:
        passes.append(current().recomputing)

    model.model.layers[0].mlp.down_proj.register_forward_hook(note)
    ids = torch.arange(3, 20)[None]
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert passes == ([False, True] if checkpointing else [False])


def test_refused_pairs_say_why() -> None:
    config = {
        "version": 1,
        "sites": {},
        "model": {"exits": {"layers": [1]}, "recursion": {"blocks": 2}},
    }
    with pytest.raises(adaptive_schema.AdaptiveConfigError, match="cannot be combined: an exit"):
        adaptive_schema.read(config)


def test_older_versions_are_migrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_schema, "VERSION", 2)
    monkeypatch.setitem(
        adaptive_schema.MIGRATIONS, 1, lambda old: {**old, "version": 2, "model": {}}
    )
    old = {"version": 1, "sites": {}}
    assert adaptive_schema.read(old) == {"version": 2, "sites": {}, "model": {}}
    assert old == {"version": 1, "sites": {}}, "the argument is not changed"


def test_context_moves_with_gathered_tokens() -> None:
    mask = torch.tensor([[True, True, False], [False, True, True]])
    with entered(Call(token_mask=mask)):
        with gathered(torch.tensor([0, 2, 5])):
            assert current().token_mask.tolist() == [True, False, True]  # type: ignore[union-attr]
        with gathered(torch.tensor([[2], [0]])):
            assert current().token_mask.tolist() == [[False], [False]]  # type: ignore[union-attr]
        assert current().token_mask is mask
    assert current().token_mask is None
