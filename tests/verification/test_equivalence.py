"""The comparison of logits: equal models agree in both modes, and a fault is found and placed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adaconvert.errors import ResourceError, VerificationError
from adaconvert.io.available import available_memory
from adaconvert.io.source import Source
from adaconvert.testing.by_hand import upcycle_by_hand
from adaconvert.testing.tiny_models import make
from adaconvert.verification.comparison import load_target
from adaconvert.verification.equivalence import Equivalence, choose_mode, compare
from adaconvert.verification.memory import layerwise_need, whole_need
from adaconvert.verification.tokens import Probe

if TYPE_CHECKING:
    from adaconvert.testing.by_hand import Tensors


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama-tied", tmp_path_factory.mktemp("dense") / "m", layers=3)


def probe_of(folder: Path) -> Probe:
    return Probe.from_text("one two three four five six seven", folder, sequences=2, length=10)


def measured(dense: Path, target: Path, *, mode: str = "whole") -> Equivalence:
    probe = probe_of(dense)
    memory = None
    if mode == "layerwise":
        sources = (Source.open(dense), Source.open(target))
        memory = layerwise_need(sources, tokens=probe.tokens)
    found = compare(dense, target, probe=probe, memory=memory)
    assert found.mode == mode
    return found


@pytest.mark.smoke
def test_identical_experts_compute_the_dense_model(dense: Path, tmp_path: Path) -> None:
    found = measured(dense, upcycle_by_hand(dense, tmp_path / "t"))
    assert found.close
    assert found.relative < 1e-6
    assert found.logits.argmax_agreement == 1
    assert found.logits.tokens == 20
    assert 0 <= found.logits.kl < 1e-10
    assert len(found.layers) == 3
    assert max(found.layers) < 1e-6
    assert found.first_bad_layer is None
    assert found.blame() == ""
    assert not found.keys


@pytest.mark.smoke
def test_layerwise_gives_the_same_numbers(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t")
    whole, layerwise = measured(dense, target), measured(dense, target, mode="layerwise")
    assert layerwise.logits == whole.logits
    assert layerwise.layers == whole.layers
    assert layerwise.embedding == whole.embedding
    assert layerwise.routing == whole.routing


def break_layer_1(tensors: Tensors) -> None:
    for expert in range(4):
        tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"] *= 1.001


def break_attention(tensors: Tensors) -> None:
    tensors["model.layers.2.self_attn.q_proj.weight"] *= 1.01


def break_embedding(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"][:, 3] += 0.1


def break_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight"][5] *= 1.1


def distinct_experts(tensors: Tensors) -> None:
    # whatever a token's weights are, one changed expert must show
    tensors["model.layers.0.block_sparse_moe.experts.3.w1.weight"] *= -1


@pytest.mark.parametrize("mode", ["whole", "layerwise"])
@pytest.mark.parametrize(
    ("edit", "layer", "blame"),
    [
        (break_layer_1, 1, "layer 1 is the first that differs"),
        (break_attention, 2, "layer 2 is the first that differs"),
        (distinct_experts, 0, "layer 0 is the first that differs"),
        (break_embedding, None, "the embedding is the first part that differs"),
        (break_norm, None, "all blocks agree, so the final norm or the head differs"),
    ],
)
def test_a_fault_is_placed(
    dense: Path, tmp_path: Path, edit: object, layer: int | None, blame: str, mode: str
) -> None:
    assert callable(edit)
    found = measured(dense, upcycle_by_hand(dense, tmp_path / "t", edit=edit), mode=mode)
    assert not found.close
    assert found.first_bad_layer == layer
    assert found.blame() == blame


@pytest.mark.parametrize("mode", ["whole", "layerwise"])
def test_a_wrong_window_is_found(dense: Path, tmp_path: Path, mode: str) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t", config={"sliding_window": 4})
    found = measured(dense, target, mode=mode)
    assert found.first_bad_layer == 0


def test_nan_is_not_close(dense: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")

    found = measured(dense, upcycle_by_hand(dense, tmp_path / "t", edit=edit))
    assert not found.logits.finite
    assert not found.close
    assert found.first_bad_layer == 1


def test_a_missing_tensor_is_reported_or_refused(dense: Path, tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.gate.weight"

    def edit(tensors: Tensors) -> None:
        del tensors[name]

    target = upcycle_by_hand(dense, tmp_path / "t", edit=edit)
    assert measured(dense, target).keys.missing == ("model.layers.1.mlp.gate.weight",)
    with pytest.raises(VerificationError, match=r"in block 1, .*model\.layers\.1\.mlp\.gate"):
        measured(dense, target, mode="layerwise")


def test_what_transformers_refuses_is_a_verification_error(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t", config={"intermediate_size": 48})
    with pytest.raises(VerificationError, match="transformers cannot load it"):
        measured(dense, target)


def test_logits_of_another_width_are_refused(dense: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-8].clone()

    target = upcycle_by_hand(dense, tmp_path / "t", edit=edit, config={"vocab_size": 312})
    with pytest.raises(VerificationError, match=r"another shape; expected \[2, 10, 320\]"):
        measured(dense, target)


def test_mode_follows_the_memory_given(dense: Path, tmp_path: Path) -> None:
    sources = (Source.open(dense), Source.open(upcycle_by_hand(dense, tmp_path / "t")))
    whole, least = whole_need(sources, tokens=20), layerwise_need(sources, tokens=20)
    assert least < whole < available_memory()
    assert choose_mode(sources, 20, whole) == "whole"
    assert choose_mode(sources, 20, whole - 1) == "layerwise"
    assert choose_mode(sources, 20, least) == "layerwise"
    assert choose_mode(sources, 20, None) == "whole"
    with pytest.raises(ResourceError, match=r"--memory: .*expected at least .* for one block"):
        choose_mode(sources, 20, least - 1)


def test_the_need_counts_every_weight_in_float32(tmp_path: Path) -> None:
    half = Source.open(make("llama", tmp_path / "half", dtype="bfloat16"))
    full = Source.open(make("llama", tmp_path / "full"))
    assert whole_need([half], tokens=8) == whole_need([full], tokens=8)
    weights = sum(ref.nbytes for ref in full.tensors.values())
    assert whole_need([full], tokens=8) > weights


def test_the_target_is_loaded_as_a_user_would(dense: Path, tmp_path: Path) -> None:
    target = Source.open(upcycle_by_hand(dense, tmp_path / "t"))
    model, keys = load_target(target)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert not keys
    assert not model.training


def test_sixteen_bit_copies_are_exact_in_float32(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "d", dtype="bfloat16")
    found = measured(source, upcycle_by_hand(source, tmp_path / "t"))
    assert found.relative < 1e-6
