"""Every split with every router and rule, planned and run; and what a run says of its quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adaconvert
from adaconvert.io.reader import read_numpy
from adaconvert.io.source import Source
from adaconvert.methods.moefy.config import DATA_SPLITS, ROUTERS, SPLITS
from adaconvert.testing.tiny_models import make

RULES: tuple[dict[str, object], ...] = (
    {"rule": "top-k", "top_k": 3},
    {"rule": "dynamic-k", "tau": 0.4},
    {"rule": "threshold", "threshold": 0.1},
    {"rule": "top-p", "top_p": 0.7},
)


def adaptive_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["adaptive"]
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("models") / "dense")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_split_runs_with_every_router(
    split: str, router: str, dense: Path, text: Path, tmp_path: Path
) -> None:
    rule = RULES[(SPLITS.index(split) + ROUTERS.index(router)) % len(RULES)]
    options: dict[str, Any] = {"split": split, "router": router, "num_experts": 7, **rule}
    if split != "shared+routed":
        options["num_experts"] = 8
    if split in DATA_SPLITS:
        options |= {"data": str(text), "data_tokens": 300}
    plan = adaconvert.plan(dense, method="moefy", **options)
    assert plan.exactness.kind == "approximate"
    made = adaconvert.convert(dense, destination=tmp_path / "moe", method="moefy", **options)
    verification = made.manifest["verification"]
    assert isinstance(verification, dict)
    assert verification["ok"] is True
    assert 0 < verification["configured"]["neurons"] <= 1
    assert verification["relative_difference_below"] <= 1e-5
    ffn = adaptive_of(tmp_path / "moe")["sites"]["model.layers.1.mlp"]["ffn"]
    shared, experts = ffn["shared"], ffn["experts"]
    assert shared + experts["count"] * experts["width"] == 64
    assert (shared > 0) == (split == "shared+routed")
    assert ffn["partition"]["permuted"] == (split != "contiguous")


@pytest.mark.parametrize("router", ["param-center", "gate"])
def test_thresholds_are_found_for_each_layer(
    router: str, dense: Path, text: Path, tmp_path: Path
) -> None:
    made = adaconvert.convert(
        dense,
        destination=tmp_path / "moe",
        method="moefy",
        split="contiguous",
        num_experts=16,
        router=router,
        rule="threshold",
        keep=0.5,
        data=str(text),
        probe=text,
    )
    sites = adaptive_of(tmp_path / "moe")["sites"]
    found = [slots["ffn"]["select"]["threshold"] for slots in sites.values()]
    assert len(set(found)) == 2
    assert all(value > 0 for value in found)
    configured = made.manifest["verification"]["configured"]  # type: ignore[index]
    # the same text, in other blocks and with its first tokens more often
    assert configured["neurons"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("given", [True, False])
def test_to_keep_every_expert_is_exact(
    given: bool, dense: Path, text: Path, tmp_path: Path
) -> None:
    made = adaconvert.convert(
        dense,
        destination=tmp_path / "moe",
        method="moefy",
        num_experts=16,
        rule="threshold",
        keep=1.0,
        **({"data": str(text)} if given else {}),
    )
    assert made.manifest["exactness"] == {
        "kind": "exact",
        "why": "the neurons are only put in another order, and every expert runs",
    }
    for slots in adaptive_of(tmp_path / "moe")["sites"].values():
        assert slots["ffn"]["select"] == {"rule": "threshold", "threshold": 0.0}
    configured = made.manifest["verification"]["configured"]  # type: ignore[index]
    assert configured["neurons"] == 1


def test_single_neurons_behind_the_gate_stay_where_they_are(dense: Path, tmp_path: Path) -> None:
    adaconvert.convert(
        dense, destination=tmp_path / "moe", method="moefy", expert_width=1, router="gate", top_k=32
    )
    ffn = adaptive_of(tmp_path / "moe")["sites"]["model.layers.0.mlp"]["ffn"]
    assert ffn["partition"] == {"split": "balanced-kmeans", "permuted": False}
    assert set(Source.open(tmp_path / "moe").tensors) == set(Source.open(dense).tensors)


def test_the_order_says_where_each_neuron_came_from(dense: Path, tmp_path: Path) -> None:
    adaconvert.convert(
        dense,
        destination=tmp_path / "moe",
        method="moefy",
        split="random",
        layers="1",
        num_experts=4,
        router="oracle",
        verify=False,
    )
    before, after = Source.open(dense), Source.open(tmp_path / "moe")
    stem = "model.layers.{}.mlp"
    assert f"{stem.format(0)}.neuron_order" not in after.tensors
    ref = after.tensors[f"{stem.format(1)}.neuron_order"]
    order = read_numpy(after, ref)
    assert (ref.dtype, sorted(order)) == ("I32", list(range(64)))
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        name = f"{stem.format(1)}.{name}.weight"
        old, new = read_numpy(before, before.tensors[name]), read_numpy(after, after.tensors[name])
        assert np.array_equal(old.take(order, axis=axis), new)


def test_the_same_seed_gives_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        adaconvert.convert(
            dense,
            destination=tmp_path / name,
            method="moefy",
            split="random",
            router="gate",
            seed=seed,
            verify=False,
        )
    files = {name: {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    assert files["a"]["model.safetensors"] != files["c"]["model.safetensors"]


def test_the_report_offers_single_neurons_where_they_are_better(
    dense: Path, tmp_path: Path
) -> None:
    made = adaconvert.convert(
        dense,
        destination=tmp_path / "moe",
        method="moefy",
        split="random",
        num_experts=4,
        router="similarity",
        top_k=2,
    )
    said = "\n".join(made.verification_lines)
    assert "as configured, experts of 16: 50.0% of the neurons" in said
    assert "neuron by neuron, by the gate: 50.0% of the neurons, 66.7% of the FLOPs" in said
    assert "use --router gate with --expert-width 1" in said
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "as configured, experts of 16 neurons: 50 % of the neurons" in card
    assert "trust_remote_code=True" in card
    assert "import adaconvert.auto" in card
    assert "The routers are not trained." in card


def test_reference_flops_count_every_matrix_and_the_mean_context(dense: Path) -> None:
    from adaconvert.methods.sources import open_source
    from adaconvert.planning.estimate import reference

    spec = open_source(str(dense)).spec
    ffn = 2 * 3 * 32 * 64
    attention = 2 * (2 * 32 * 32 + 2 * 32 * 16)
    scores = 4 * 4 * 8 * 513 // 2
    head = 2 * 320 * 32
    assert reference(spec, frozenset({0})) == {
        "flops_per_token": 2 * (ffn + attention + scores) + head,
        "ffn_flops_per_token": ffn,
        "length": 512,
    }


def test_the_plan_counts_what_the_configured_experts_cost(dense: Path) -> None:
    full = adaconvert.plan(dense, method="moefy", router="gate", expert_width=1)
    half = adaconvert.plan(dense, method="moefy", router="gate", expert_width=1, top_k=32)
    assert full.before.ffn_flops == full.after.ffn_flops
    # the gate runs in full, up and down by half
    assert half.after.ffn_flops == full.after.ffn_flops * 2 // 3


def test_a_model_too_large_for_memory_is_compared_block_by_block(
    dense: Path, tmp_path: Path
) -> None:
    from adaconvert.verification.memory import layerwise_need

    adaconvert.convert(
        dense,
        destination=tmp_path / "moe",
        method="moefy",
        split="random",
        num_experts=4,
        router="similarity",
        top_k=2,
        verify=False,
    )
    sources = [Source.open(dense), Source.open(tmp_path / "moe")]
    least = layerwise_need(sources, tokens=512)
    found = adaconvert.verify(dense, tmp_path / "moe", memory=least)
    assert found.ok
    assert found.equivalence is not None
    assert found.equivalence.mode == "layerwise"
    assert found.equivalence.quality is None
    assert "the configured selection was not run" in "\n".join(found.lines())


def test_verification_catches_a_neuron_out_of_place(dense: Path, tmp_path: Path) -> None:
    """Swapping two rows of one matrix alone breaks the network, whatever the files' hashes say."""
    from safetensors.torch import load_file, save_file

    from adaconvert.verification.equivalence import compare
    from adaconvert.verification.tokens import Probe

    adaconvert.convert(
        dense,
        destination=tmp_path / "moe",
        method="moefy",
        split="random",
        num_experts=4,
        router="gate",
        max_shard_size="1GB",
        verify=False,
    )
    file = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(file)
    rows = tensors["model.layers.1.mlp.up_proj.weight"]
    rows[[3, 4]] = rows[[4, 3]].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    found = compare(dense, tmp_path / "moe", probe=Probe.shipped(dense))
    assert not found.close
    assert found.first_bad_layer == 1


def test_inspect_says_what_is_split(dense: Path, tmp_path: Path) -> None:
    adaconvert.convert(
        dense, destination=tmp_path / "moe", method="moefy", num_experts=4, verify=False, top_k=1
    )
    found = adaconvert.inspect(tmp_path / "moe")
    assert found.problems == ()
    assert found.lines()[0] == (
        "moe: llama (LlamaForCausalLM), adaptive: 2 of 2 feed-forward networks split, 4 experts of "
        "16 neurons, router param-center, top-k 1"
    )
    assert found.to_json()["adaptive"] is True
