"""Adapters: what they sit on, that their sum with the weights is exact, and that nothing is left
out silently."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adaconvert.errors import InterruptedRunError, OptionError, ResourceError
from adaconvert.layerwise.quiet import quiet
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.stored import tensors_of
from adaconvert.train.adapt import adapter_names, attach, merge, targets_of
from adaconvert.train.adapt_config import Adapting
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.parts import is_adapter
from adaconvert.train.prepare import prepare
from adaconvert.train.result import FinetuneResult
from adaconvert.train.shards import gathered, restore

Tune = Callable[..., FinetuneResult]
IDS = torch.arange(24).reshape(2, 12)
FAMILIES = ["llama-tied", "gpt2", "mixtral", "qwen2_moe", "granitemoe", "glm4_moe"]


@pytest.fixture(scope="module")
def folders(adaptive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"adaptive": adaptive, **{f: tiny_models.make(f, root / f) for f in FAMILIES}}


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with quiet():
        return load_model(folder).to(dtype)


def stirred(model: Any) -> None:
    """Give both factors of every adapter values; the same for the same weight."""
    own = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    generator = torch.Generator().manual_seed(3)
    for name in sorted(own, key=adapter_names(model).__getitem__):
        with torch.no_grad():
            own[name].normal_(0, 0.1, generator=generator)


def adapted(model: Any, *targets: str) -> Any:
    options = Adapting(rank=4, targets=targets or ("all",))
    return attach(model, targets_of(model, options.targets), options, seed=0)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error in roundings of float32."""
    norm = float((found.double() - expected.double()).norm() / expected.double().norm())
    return norm / torch.finfo(torch.float32).eps


@pytest.mark.parametrize("family", [*FAMILIES, "adaptive"])
def test_sum_computes_what_adapters_compute(family: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[family])
    names = [name for name, _ in model.named_parameters()]
    before = logits_of(model)
    tuner = adapted(model)
    assert torch.equal(logits_of(model), before)
    stirred(model)
    expected = logits_of(model)
    merge(model, tuner)
    found = logits_of(model)
    assert distance(before, expected) > 1e5
    # products in another order
    assert distance(found, expected) <= 16
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("family", ["mixtral", "llama-tied"])
def test_sum_is_rounded_once(family: str, folders: dict[str, Path]) -> None:
    wide, narrow = (loaded(folders[family], torch.bfloat16) for _ in range(2))
    tuners = [adapted(model) for model in (wide, narrow)]
    for model in (wide, narrow):
        stirred(model)
    merge(wide, tuners[0], keep_wide=True)
    merge(narrow, tuners[1])
    kept = dict(wide.named_parameters())
    rounded = 0
    for name, weight in narrow.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(kept[name].to(torch.bfloat16), weight)
        rounded += kept[name].dtype == torch.float32
    assert rounded == len(targets_of(narrow, ["all"]))


@pytest.mark.parametrize(
    ("family", "target", "count"),
    [
        ("mixtral", "experts", 2 * 2),
        ("mixtral", "attention", 2 * 4),
        ("mixtral", "all", 2 * 6),
        ("mixtral", "q_proj", 2),
        # stacks of routed experts, three matrices of the shared one
        ("qwen2_moe", "experts", 2 * 5),
        ("glm4_moe", "all", 2 * 4 + 3 + 5),
        ("adaptive", "experts", 2 * 3),
        ("gpt2", "all", 2 * 4),
    ],
)
def test_targets(family: str, target: str, count: int, folders: dict[str, Path]) -> None:
    model = loaded(folders[family])
    found = targets_of(model, [target])
    assert len(found) == count
    adapted(model, target)
    assert sum(is_adapter(name) for name, _ in model.named_parameters()) == 2 * count
    assert not any("router" in name or "embed" in name for name in found)


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("llama-tied", "experts", "matches no matrix that can be adapted; expected attention, all"),
        ("mixtral", "nothing", "matches no matrix that can be adapted"),
        ("mixtral", r"mlp\.gate\.", "matches 'model.layers.0.mlp.gate.weight', which is no matrix"),
        ("llama-tied", "embed_tokens", "matches 'model.embed_tokens.weight', which is no matrix"),
    ],
)
def test_target_that_matches_nothing_is_refused(
    family: str, target: str, message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(OptionError, match=message):
        targets_of(loaded(folders[family]), ["attention", target])


@pytest.mark.parametrize("family", ["mixtral", "adaptive"])
def test_result_is_a_normal_checkpoint_in_which_only_targets_moved(
    family: str, folders: dict[str, Path], tune: Tune, tmp_path: Path
) -> None:
    result = tune(folders[family], steps=2, lora=2, lora_targets=("experts",))
    before, after = tensors_of(folders[family]), tensors_of(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = (".experts.", ".mlp.gate_proj.", ".mlp.up_proj.", ".mlp.down_proj.")
    assert moved
    assert all(any(part in name for part in parts) for name in moved)
    assert list(result.summary["by_part"]) == ["adapters"]
    assert result.summary["options"]["adapting"]["rank"] == 2


def test_other_parts_are_trained_beside_adapters(
    folders: dict[str, Path], tune: Tune, tmp_path: Path
) -> None:
    result = tune(folders["mixtral"], steps=2, lora=2, lora_targets=("experts",), train=("router",))
    assert list(result.summary["by_part"]) == ["adapters", "router"]
    with pytest.raises(OptionError, match=r"which gets an adapter in its place"):
        tune(folders["mixtral"], "b", lora=2, lora_targets=("attention",), train=("q_proj",))


@pytest.mark.parametrize("four_bit", [False, True])
def test_adapters_are_resumed(
    four_bit: bool, folders: dict[str, Path], tune: Tune, tmp_path: Path
) -> None:
    if four_bit:
        pytest.importorskip("bitsandbytes")
    options = {"steps": 5, "save_every": 2, "log_every": 1, "lora": 2, "load_in_4bit": four_bit}

    def stop(line: str) -> None:
        if line.startswith("step 4/"):
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="--resume"):
        tune(folders["mixtral"], report=stop, **options)
    kept = load_file(tmp_path / ".out.adaconvert-training/checkpoint-2/model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj.lora_A" in kept
    assert not any(name.endswith("gate_up_proj") for name in kept)
    resumed = tune(folders["mixtral"], resume=True, **options)
    whole = tune(folders["mixtral"], "whole", **options)
    assert [e["lm"] for e in resumed.curve] == [e["lm"] for e in whole.curve]
    a, b = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in b)


# -- 4 bits


@pytest.mark.parametrize("family", ["mixtral", "adaptive", "glm4_moe"])
def test_packed_matrices_compute_what_their_values_compute(
    family: str, folders: dict[str, Path]
) -> None:
    functional: Any = pytest.importorskip("bitsandbytes").functional
    config = FinetuneConfig.of(["x"], {"steps": 1, "lora": 4, "load_in_4bit": True})
    packed, plain = loaded(folders[family]), loaded(folders[family])
    with torch.no_grad():
        for name in targets_of(plain, ["all"]):
            weight = plain.get_parameter(name)
            small = functional.quantize_4bit(weight.data, blocksize=64, quant_type="nf4")
            weight.copy_(functional.dequantize_4bit(*small))
    ready = prepare(packed, config)
    assert ready.packed == tuple(targets_of(plain, ["all"])) or set(ready.packed) == set(
        targets_of(plain, ["all"])
    )
    assert not any(p.dim() > 2 and p.numel() for p in packed.parameters())
    tuner = adapted(plain)
    stirred(packed)
    restore(plain, gathered(packed, keep=True))
    # twice, because what adapters leave behind in one use would show in the next
    for _ in range(2):
        assert distance(logits_of(packed), logits_of(plain)) <= 16
    merge(plain, tuner)
    assert distance(logits_of(packed), logits_of(plain)) <= 16


def test_gradients_through_packed_experts_are_the_same_when_recomputed(
    folders: dict[str, Path],
) -> None:
    pytest.importorskip("bitsandbytes")
    config = FinetuneConfig.of(["x"], {"steps": 1, "lora": 4, "load_in_4bit": True})
    model = loaded(folders["mixtral"]).train()
    prepare(model, config)
    stirred(model)
    found = []
    for again in (False, True):
        if again:
            with quiet():
                model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with quiet():
            model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(bool(grad.any()) for grad in found[0])


def test_result_of_4_bits_is_the_source_plus_the_adapters(
    folders: dict[str, Path], tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    from adaconvert.train.session import Session

    states: list[Any] = []
    original = Session._whole

    def whole(self: Any, state: Any) -> Any:
        states.append(state)
        return original(self, state)

    monkeypatch.setattr(Session, "_whole", whole)
    options = {"lora": 2, "load_in_4bit": True, "lora_targets": ("attention",), "dtype": "float32"}
    tune(folders["mixtral"], steps=2, **options)
    before, after = tensors_of(folders["mixtral"]), tensors_of(tmp_path / "out")
    for name, value in after.items():
        if f"{name}.lora_A" in states[0]:
            a, b = (states[0][f"{name}.lora_{factor}"] for factor in "AB")
            delta = b @ a
            assert bool(delta.any())
            assert torch.equal(value, before[name].float() + delta)
        else:
            assert torch.equal(value, before[name].float())


def test_what_cannot_be_packed_is_refused(folders: dict[str, Path], tune: Tune) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(OptionError, match=r"h.0.attn.c_attn.weight': a Conv1D cannot be held in 4"):
        tune(folders["gpt2"], lora=2, load_in_4bit=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"load_in_4bit": True},
            r"--load-in-4bit: matrices in 4 bits cannot be trained themselves",
        ),
        ({"lora_alpha": 4.0}, r"--lora-alpha: does nothing without --lora"),
        ({"lora_targets": ("experts",)}, r"--lora-targets: does nothing without --lora"),
        ({"lora": -1}, r"--lora: is out of range"),
        ({"lora": 2, "lora_targets": ("(",)}, r"--lora-targets \(: is no regular expression"),
        ({"lora": 2, "load_in_4bit": True, "compile": True}, r"--compile: cannot be combined"),
        ({"lora": 2, "load_in_4bit": True, "precision": "fp64"}, r"fp64: cannot be combined"),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, Any], message: str, dense: Path, tune: Tune
) -> None:
    with pytest.raises(OptionError, match=message):
        tune(dense, **options)


@pytest.mark.parametrize(
    ("package", "options"),
    [("peft", {"lora": 2}), ("bitsandbytes", {"lora": 2, "load_in_4bit": True})],
)
def test_missing_package_is_named(
    package: str,
    options: dict[str, Any],
    dense: Path,
    tune: Tune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ResourceError, match=rf"package {package}: --\S+ needs it; expected >= 0"):
        tune(dense, **options)
    assert os.listdir(tmp_path) == []
