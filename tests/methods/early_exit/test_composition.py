"""Exits beside what other methods make of a model: kept, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adaconvert import api
from adaconvert.errors import OptionError, SourceError
from adaconvert.modeling.loading import load_model
from adaconvert.testing.tiny_models import make

IDS = torch.arange(3, 30)[None]


def exits_in(folder: Path) -> Any:
    """Return the exits config.json tells of."""
    return json.loads((folder / "config.json").read_text())["adaptive"]["model"]["exits"]


def logits(folder: Path) -> torch.Tensor:
    """Return what a checkpoint gives."""
    with torch.no_grad():
        found: torch.Tensor = load_model(folder)(input_ids=IDS, use_cache=False).logits
    return found


def exit_at(folder: Path, place: int, dtype: str = "auto") -> torch.Tensor:
    """Return what an exit of a checkpoint gives."""
    model: Any = load_model(folder, dtype=dtype)
    with torch.no_grad():
        state = model.exit_states([place], input_ids=IDS)[place]
        found: torch.Tensor = model.exit_logits(place, state)
    return found


def with_exits(source: Path, out: Path, **given: Any) -> Path:
    """Return a checkpoint with an exit after its first block."""
    api.convert(source, destination=out, method="early-exit", exits="1", **given)
    return out


@pytest.mark.parametrize("head", ["mlp", "full", "affine"])
def test_on_a_split_model(head: str, tmp_path: Path) -> None:
    source, split = make("llama", tmp_path / "dense"), tmp_path / "split"
    api.convert(source, destination=split, method="moefy", num_experts=4, top_k=2)
    out = with_exits(split, tmp_path / "out", head=head)
    assert torch.equal(logits(out), logits(split))
    adaptive = json.loads((out / "config.json").read_text())["adaptive"]
    assert len(adaptive["sites"]) == 2
    assert adaptive["calibration"] is None
    # fewer experts, then exits beside them: the rule changes, the exits stay
    again = tmp_path / "again"
    api.convert(out, destination=again, method="d2dmoe", stages="4", tau=0.3)
    assert exits_in(again) == exits_in(out)
    assert not torch.equal(logits(again), logits(out))


def test_a_copy_of_a_split_network_is_the_network(tmp_path: Path) -> None:
    source, split = make("llama", tmp_path / "dense"), tmp_path / "split"
    api.convert(source, destination=split, method="moefy", num_experts=4, top_k=4)
    whole = with_exits(source, tmp_path / "whole", head="mlp")
    out = with_exits(split, tmp_path / "out", head="mlp")
    found, expected = (exit_at(folder, 1, "float64") for folder in (out, whole))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", ["norm", "affine"])
def test_on_null_experts(head: str, tmp_path: Path) -> None:
    source, nulled = make("mixtral", tmp_path / "moe"), tmp_path / "nulled"
    api.convert(source, destination=nulled, method="adamoe", null_experts=4)
    out = with_exits(nulled, tmp_path / "out", head=head)
    assert torch.equal(logits(out), logits(nulled))
    for more in ({}, {"materialize": True}):
        with pytest.raises(SourceError, match=r"has early exits .mixtral., which would be lost"):
            api.convert(out, destination=tmp_path / "x", method="adamoe", **more)
    with pytest.raises(OptionError, match="block 0 is a mixture of experts"):
        with_exits(nulled, tmp_path / "y", head="mlp")


def test_on_routed_adapters(tmp_path: Path) -> None:
    source, adapted = make("llama", tmp_path / "dense"), tmp_path / "adapted"
    given: dict[str, Any] = {"method": "molora", "standalone": True, "rank": 2, "experts": 2}
    api.convert(source, destination=adapted, target_modules="q_proj", **given)
    out = with_exits(adapted, tmp_path / "out", head="mlp")
    assert torch.equal(logits(out), logits(adapted))
    with pytest.raises(OptionError, match=r"q_proj has routed adapters, which a copy would lack"):
        with_exits(adapted, tmp_path / "x", head="layer")


def test_new_adapters_on_a_model_with_exits(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    first, out = with_exits(source, tmp_path / "first", head="mlp"), tmp_path / "out"
    done = api.convert(first, destination=out, method="molora", standalone=True, rank=2)
    assert done.manifest["verification"]["relative_difference_below"] == 1e-12  # type: ignore[index]
    assert exits_in(out) == exits_in(first)
    assert torch.equal(exit_at(out, 1), exit_at(first, 1))
    with pytest.raises(SourceError, match=r"has early exits .llama., which a stock mixture cannot"):
        api.convert(first, destination=tmp_path / "x", method="molora", as_moe=True)


def test_adapters_that_exist_are_refused_where_exits_have_copies(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    source = make("llama", tmp_path / "dense")
    for name, target in (("q", "q_proj"), ("up", "up_proj")):
        config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        made: Any = get_peft_model(load_model(source), config)
        made.save_pretrained(tmp_path / name)
    first = with_exits(source, tmp_path / "first", head="mlp")
    given: dict[str, Any] = {"method": "molora", "standalone": True}
    done = api.convert(
        first, destination=tmp_path / "out", adapters=(str(tmp_path / "q"),), **given
    )
    assert exits_in(done.destination) == exits_in(first)
    with pytest.raises(SourceError, match=r"whose copies of model.layers.0.mlp.up_proj would lack"):
        api.convert(first, destination=tmp_path / "x", adapters=(str(tmp_path / "up"),), **given)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("moefy", {"num_experts": 4}),
        ("upcycle", {}),
        ("unmoefy", {}),
        ("adamoe", {"via": "moefy"}),
        ("d2dmoe", {"stages": "2"}),
        ("d2dmoe", {"stages": "4", "tau": 0.5}),
    ],
)
def test_methods_that_would_lose_them(method: str, given: dict[str, Any], tmp_path: Path) -> None:
    out = with_exits(make("llama", tmp_path / "dense"), tmp_path / "out", verify=False)
    with pytest.raises(SourceError, match="has early exits") as caught:
        api.convert(out, destination=tmp_path / "x", method=method, **given)
    assert "Convert the checkpoint they were added to" in str(caught.value)


def test_a_second_time(tmp_path: Path) -> None:
    out = with_exits(make("llama", tmp_path / "dense"), tmp_path / "out", verify=False)
    with pytest.raises(SourceError, match="has exits already, at 1"):
        with_exits(out, tmp_path / "x")


@pytest.mark.parametrize("head", ["mlp", "full", "affine"])
def test_it_is_verified_block_by_block_as_well(head: str, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    out = with_exits(source, tmp_path / "out", head=head)
    found = api.verify(source, out, memory="69MB")
    assert found.ok
    assert found.equivalence is not None
    assert found.equivalence.mode == "layerwise"
    assert "without its exits" in found.notes[-1]


def test_a_damaged_exit_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from adaconvert.errors import VerificationError

    source = make("llama", tmp_path / "dense")
    out = with_exits(source, tmp_path / "out")
    held = load_file(out / "model.safetensors")
    held["exits.1.norm.weight"] += 1
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"exits.1.norm.weight"):
        api.verify(source, out)


def test_exits_of_another_base_are_found(tmp_path: Path) -> None:
    from adaconvert.errors import VerificationError

    source, other = make("llama", tmp_path / "dense"), make("llama", tmp_path / "other", seed=1)
    out = with_exits(source, tmp_path / "out", head="norm")
    with pytest.raises(VerificationError, match="the embedding is the first part that differs"):
        api.verify(other, out)


def test_a_source_that_leaves_early_is_compared_at_full_depth(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    first = with_exits(source, tmp_path / "first", threshold=0.0)
    # every exit is surer than nothing, so tokens leave
    assert not torch.equal(logits(first), logits(source))
    done = api.convert(
        first, destination=tmp_path / "out", method="molora", standalone=True, rank=2
    )
    found: Any = done.manifest["verification"]
    assert (found["ok"], found["relative_difference_below"]) == (True, 1e-12)
    assert torch.equal(logits(tmp_path / "out"), logits(first))


def test_a_mixture_whose_routers_are_called_so_runs_in_bfloat16(tmp_path: Path) -> None:
    """GraniteMoE names its routers as ours are named, which stay in float32; its own do not."""
    dense = make("granitemoe", tmp_path / "dense")
    load_model(dense, dtype="bfloat16").save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (dense / name).exists():
            shutil.copy(dense / name, tmp_path / "source" / name)
    out = with_exits(tmp_path / "source", tmp_path / "out", head="norm")
    assert torch.equal(logits(out), logits(tmp_path / "source"))
    assert torch.isfinite(exit_at(out, 1)).all()
    rows = [{"text": f"number {at}: the cat sat on the mat. " * 6} for at in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    short: dict[str, Any] = {"steps": 1, "seq_len": 32, "batch_size": 2, "save_every": 0}
    # from float32 to bfloat16 as well, routers included
    wide = with_exits(dense, tmp_path / "wide", head="norm")
    api.finetune(
        wide,
        tmp_path / "tuned",
        data=str(tmp_path / "text.jsonl"),
        dtype="bfloat16",
        device="cpu",
        **short,
    )
    held = load_file(tmp_path / "tuned" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
