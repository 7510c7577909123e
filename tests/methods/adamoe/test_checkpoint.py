"""What a checkpoint with null experts holds, how it is kept, and what verification says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaconvert
from adaconvert.errors import InterruptedRunError, OptionError, VerificationError
from adaconvert.methods.registry import method_of
from adaconvert.methods.sources import open_source
from adaconvert.modeling.loading import CODE_FILES, load_model
from adaconvert.planning.digest import run_digest
from adaconvert.testing.tiny_models import make

Make = Callable[..., Path]


@pytest.fixture
def nulled(tmp_path: Path) -> Make:
    """Return what makes a tiny model and gives it null experts, next to it."""

    def convert(name: str, make_with: dict[str, Any] | None = None, **options: Any) -> Path:
        source = tmp_path / "source"
        if not source.exists():
            make(name, source, **{"max_shard_size": "1GB", **(make_with or {})})
        out = tmp_path / "out"
        adaconvert.convert(source, destination=out, method="adamoe", **options)
        return out

    return convert


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def spec_of(folder: Path, path: str) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return dict(config["adaptive"]["sites"][path]["ffn"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "stored", "router"),
    [
        ("mixtral-tied", "model.layers.{}.block_sparse_moe", "gate.weight"),
        ("granitemoe", "model.layers.{}.block_sparse_moe", "router.layer.weight"),
        ("olmoe", "model.layers.{}.mlp", "gate.weight"),
    ],
)
def test_stock_tensors_stay_as_they_are(
    name: str, stored: str, router: str, dtype: str, nulled: Make, tmp_path: Path
) -> None:
    out = nulled(name, {"dtype": dtype}, null_experts=8)
    source, found = tensors(tmp_path / "source"), tensors(out)
    own = {name for name in found if ".null_experts." in name}
    assert set(found) - own == set(source)
    assert all(torch.equal(found[name], source[name]) for name in source)
    for layer in range(2):
        site = stored.format(layer)
        weight = source[f"{site}.{router}"]
        assert torch.equal(found[f"{site}.null_experts.weight"], torch.cat([weight, weight]))
        assert torch.equal(found[f"{site}.null_experts.bias"], torch.zeros(1))
    assert len(own) == 4
    assert set(CODE_FILES) <= {file.name for file in out.iterdir()}


def test_config_states_the_contract(nulled: Make) -> None:
    out = nulled("mixtral", target_compute=0.7)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["AdaptiveMixtralForCausalLM"]
    assert config["model_type"] == "adaptive_mixtral"
    assert config["auto_map"]["AutoModelForCausalLM"] == (
        "modeling_adaptive.AdaptiveMixtralForCausalLM"
    )
    assert config["adaptive"]["base"]["architecture"] == "MixtralForCausalLM"
    assert spec_of(out, "model.layers.1.mlp") == {
        "mixture": {
            "router": "gate",
            "experts": "experts",
            "top_k": 2,
            "combine": "renorm",
            "scaling": 1.0,
            "float32": False,
            "glu": True,
        },
        "weights": {},
        "activation": "silu",
        "hidden": 32,
        "intermediate": 256,
        "partition": {"split": "mixture", "permuted": False},
        "experts": {"count": 4, "width": 64},
        "shared": 0,
        "router": {"kind": "mixture"},
        "select": {"rule": "null"},
        "combine": "unit",
        "null": {
            "count": 4,
            "slots": 4,
            "kind": "zero",
            "weights": "real",
            "gain": 1.0,
            "min_real": 1,
            "target": 0.7,
            "start": 2,
        },
    }
    # two experts of three matrices, and the router, in two blocks
    reference = config["adaptive"]["reference"]
    assert reference["ffn_flops_per_token"] == 2 * 2 * (2 * 3 * 32 * 64 + 4 * 32)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 1),
        ({"target_compute": 0.5}, 1),
        ({"target_compute": 0.49}, 0),
        ({"layer_budget": "0=0.9,1=0.4"}, 0),
        ({"target_compute": 0.9, "layer_budget": "1=0.8"}, 1),
        ({"target_compute": 0.4, "layer_budget": "0-=0.8"}, 1),
        ({"null_weights": "selected"}, 0),
        ({"min_real": 0}, 0),
    ],
)
def test_a_token_keeps_an_expert_where_the_budget_leaves_room(
    options: dict[str, Any], least: int, nulled: Make
) -> None:
    config = json.loads((nulled("mixtral", **options) / "config.json").read_text())
    sites = config["adaptive"]["sites"].values()
    assert {site["ffn"]["null"]["min_real"] for site in sites} == {least}


@pytest.mark.parametrize("kind", ["identity", "constant"])
def test_kinds_that_compute_start_at_nothing(kind: str, nulled: Make) -> None:
    out = nulled("qwen3_moe", null_kind=kind)
    found = tensors(out)
    name, shape = {"identity": ("scale", (1,)), "constant": ("value", (4, 32))}[kind]
    value = found[f"model.layers.0.mlp.null_experts.{name}"]
    assert value.dtype == torch.float32
    assert torch.equal(value, torch.zeros(shape))


def test_bias_start_takes_any_number(nulled: Make) -> None:
    out = nulled("qwen2_moe", null_init="bias", null_experts=3, null_weights="selected")
    found = tensors(out)
    assert torch.equal(found["model.layers.0.mlp.null_experts.weight"], torch.zeros(3, 32))
    assert float(found["model.layers.0.mlp.null_experts.bias"]) == -1e4
    null = spec_of(out, "model.layers.0.mlp")["null"]
    assert (null["slots"], null["gain"], null["weights"]) == (2, 1.0, "selected")


def test_blocks_have_budgets_of_their_own(nulled: Make) -> None:
    out = nulled("mixtral", target_compute=0.8, layer_budget="1-=0.5")
    targets = [spec_of(out, f"model.layers.{n}.mlp")["null"]["target"] for n in range(2)]
    assert targets == [0.8, 0.5]


def test_only_the_named_blocks_get_null_experts(nulled: Make) -> None:
    out = nulled("mixtral", layers="1")
    assert [name for name in tensors(out) if ".0.block_sparse_moe.null_experts." in name] == []
    config = json.loads((out / "config.json").read_text())
    assert list(config["adaptive"]["sites"]) == ["model.layers.1.mlp"]
    per_block = 2 * (2 * 3 * 32 * 64 + 4 * 32)
    assert config["adaptive"]["reference"]["ffn_flops_per_token"] == per_block


def test_sharded_sources_and_results(nulled: Make, tmp_path: Path) -> None:
    out = nulled("mixtral", {"max_shard_size": "60KB"}, max_shard_size="50KB")
    assert len(list(out.glob("*.safetensors"))) > 3
    assert set(tensors(tmp_path / "source")) < set(tensors(out))


def test_an_interrupted_run_goes_on(
    nulled: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaconvert import conversion

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(conversion, "_write_side_files", stop)
        with pytest.raises(InterruptedRunError, match="complete shards are kept"):
            nulled("olmoe", max_shard_size="60KB")
    assert not (tmp_path / "out").exists()
    whole = nulled("olmoe", max_shard_size="60KB", resume=True)
    assert len(tensors(whole)) == len(tensors(tmp_path / "source")) + 4
    # a finished one is found complete
    nulled("olmoe", max_shard_size="60KB", resume=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"null_init": "bias", "null_experts": 3, "layer_budget": "0=0.9", "layers": "0"},
        {"materialize": True, "null_experts": 8},
        {"null_kind": "constant", "min_real": 1, "target_compute": 0.75},
    ],
)
def test_the_manifest_gives_the_plan_again(
    options: dict[str, Any], nulled: Make, tmp_path: Path
) -> None:
    out = nulled("mixtral", **options)
    record = json.loads((out / "adaconvert.json").read_text())
    described = [open_source(str(tmp_path / "source"))]
    plan = method_of("adamoe").replan(record["options"], described)
    assert run_digest(plan, 5 * 10**9) == record["plan_digest"]
    assert record["verification"]["ok"] is True
    assert adaconvert.verify(tmp_path / "source", out).ok


def _with_bias(folder: Path, value: float) -> None:
    (file,) = folder.glob("*.safetensors")
    held = load_file(file)
    for name in held:
        if name.endswith("null_experts.bias"):
            held[name] = torch.full((1,), value)
    save_file(held, file, metadata={"format": "pt"})


def test_an_exact_start_is_held_to_what_it_is_configured_to_do(
    nulled: Make, tmp_path: Path
) -> None:
    """With null experts off every such checkpoint is its source; that proves nothing of a start."""
    from adaconvert.verification.equivalence import compare
    from adaconvert.verification.tokens import Probe

    out = nulled("mixtral")
    _with_bias(out, 5.0)
    probe = Probe.shipped(tmp_path / "source")
    given = {"probe": probe, "tolerance": 1e-5}
    assert not compare(tmp_path / "source", out, configured=True, **given).close
    assert compare(tmp_path / "source", out, configured=False, **given).close
    with pytest.raises(VerificationError):
        adaconvert.verify(tmp_path / "source", out)


def test_verification_reports_real_experts(nulled: Make, tmp_path: Path) -> None:
    report = adaconvert.verify(tmp_path / "source", nulled("deepseek_v2", top_k=4))
    assert report.equivalence is not None
    assert [layer.real for layer in report.equivalence.routing] == [2.0]
    assert "real experts per token 2" in "\n".join(report.lines())


def test_slots_that_cut_groups_are_no_exact_start(nulled: Make, tmp_path: Path) -> None:
    out = nulled("mixtral", null_experts=8, top_k=4)
    record = json.loads((out / "adaconvert.json").read_text())
    assert record["exactness"]["kind"] == "approximate"
    assert record["verification"]["configured"]["real_experts"] <= 2


def test_inspection_names_null_experts(nulled: Make) -> None:
    (line, *_) = adaconvert.inspect(nulled("granitemoe", null_experts=8)).lines()
    assert "2 blocks of 4 experts top-2 and 8 null ones (zero), 6 slots" in line
    assert "1 to 4 real experts per token" in line


def test_plan_says_what_can_be_reached(nulled: Make, tmp_path: Path) -> None:
    make("mixtral", tmp_path / "source")
    report = adaconvert.plan(
        tmp_path / "source", method="adamoe", null_experts=8, top_k=5, target_compute=0.5
    )
    notes = "\n".join(report.notes)
    assert "random logits would run 1.67" in notes
    assert "the null bias reaches 0.5 to 2 of the source's real-expert compute" in notes
    assert "the share of 0.5 is kept for `finetune`" in notes
    assert "LongCat-Flash" in notes
    verdicts = {verdict.runtime: verdict.verdict for verdict in report.runtimes}
    assert verdicts["transformers 5"] == "right"
    exact = adaconvert.plan(tmp_path / "source", method="adamoe")
    assert "`adamoe SRC --materialize`, from the source, writes" in "\n".join(exact.notes)
    # nothing is spent less before biases are fitted or trained; 4 null rows more in each router
    assert report.after.ffn_flops - exact.after.ffn_flops == 2 * 2 * 4 * 32
    line = "2 blocks at 2 real experts, what every token runs as made"
    assert exact.counted == line
    assert f"counted: {line}, not yet at its target of 0.5" in report.lines()
    selected = adaconvert.plan(tmp_path / "source", method="adamoe", null_weights="selected")
    assert "--materialize writes this as a stock mixture" in "\n".join(selected.notes)


@pytest.mark.parametrize(
    ("options", "real", "why"),
    [
        ({"null_init": "bias", "top_k": 4}, 4, "no null expert is chosen, so every token runs"),
        ({"null_experts": 8, "top_k": 3}, 1, "3 slots hold groups of 3 equal logits"),
        ({"null_experts": 8, "top_k": 7}, 3, "7 slots cut a group of 3 equal logits"),
        ({"null_experts": 8, "top_k": 5}, 2, "as long as ties go to the real one"),
    ],
)
def test_costs_are_those_the_start_spends(
    options: dict[str, Any], real: int, why: str, nulled: Make
) -> None:
    out = nulled("mixtral", target_compute=0.8, **options)
    record = json.loads((out / "adaconvert.json").read_text())
    assert record["exactness"]["kind"] == "approximate"
    assert why in record["exactness"]["why"]
    assert record["verification"]["configured"]["real_experts"] == real
    found = adaconvert.inspect(out)
    # three matrices of 64 x 32 an expert, the router; null rows are counted apart
    assert found.costs is not None
    experts = 2 * 2 * real * 3 * 32 * 64
    assert 0 <= found.costs.ffn_flops - experts < 2 * 2 * 32 * 17
    words = f"counted       2 blocks at {real} real experts, what every token runs as made, not yet"
    assert any(line.startswith(words) for line in found.lines())
    config = json.loads((out / "config.json").read_text())
    for site in config["adaptive"]["sites"].values():
        del site["ffn"]["null"]["start"]
    (out / "config.json").write_text(json.dumps(config))
    later = adaconvert.inspect(out)
    assert any("1.6 real experts, its target of 0.8, if its" in line for line in later.lines())


def test_a_stock_form_in_16_bits_says_that_logits_can_tie(nulled: Make) -> None:
    out = nulled("mixtral", {"dtype": "bfloat16"}, materialize=True)
    exactness = json.loads((out / "adaconvert.json").read_text())["exactness"]
    assert exactness["kind"] == "exact-fp32"
    assert "logits of two experts can tie" in exactness["why"]


@pytest.mark.parametrize("slots", [6, 7])
def test_rows_that_are_still_copies_are_not_cut(slots: int, nulled: Make, tmp_path: Path) -> None:
    out = nulled("mixtral", null_weights="selected", null_experts=8, top_k=slots)
    (out / "adaconvert.json").unlink()
    config = json.loads((out / "config.json").read_text())
    stock = tmp_path / "stock"
    if slots == 7:
        with pytest.raises(OptionError, match="its 7 slots cut groups of 3 rows that are still"):
            adaconvert.plan(out, method="adamoe", materialize=True)
    for site in config["adaptive"]["sites"].values():
        del site["ffn"]["null"]["start"]
    (out / "config.json").write_text(json.dumps(config))
    if slots == 6:
        adaconvert.convert(out, destination=stock, method="adamoe", materialize=True)
        return
    with pytest.raises(OptionError, match="7 slots cut groups of 3 equal rows"):
        adaconvert.convert(out, destination=stock, method="adamoe", materialize=True)
    assert not stock.exists()


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "olmoe", "deepseek_v2"])
def test_a_checkpoint_that_counts_all_selected_becomes_a_stock_mixture(
    name: str, nulled: Make, tmp_path: Path
) -> None:
    """Its rows were trained since, so that real experts are dropped."""
    out = nulled(name, null_weights="selected", null_experts=8)
    (file,) = out.glob("*.safetensors")
    held = load_file(file)
    generator = torch.Generator().manual_seed(3)
    for key, value in held.items():
        if key.endswith("null_experts.weight"):
            held[key] = value + torch.randn(value.shape, generator=generator) * value.std()
    save_file(held, file, metadata={"format": "pt"})
    stock = tmp_path / "stock"
    (out / "adaconvert.json").unlink()
    adaconvert.convert(out, destination=stock, method="adamoe", materialize=True)
    report = adaconvert.verify(out, stock)
    assert report.ok
    ids = torch.randint(3, 300, (2, 24), generator=generator)
    adaptive: Any = load_model(out)
    with torch.no_grad(), adaptive.collect("experts_run") as run:
        adaptive(input_ids=ids)
    counts = {int(count) for found in run.values() for count in torch.cat(found)}
    assert min(counts) < 2 < max(counts)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "deepseek_v2"])
def test_larger_than_memory_it_is_compared_without_null_experts(
    name: str, nulled: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaconvert.verification import equivalence

    monkeypatch.setattr(equivalence, "choose_mode", lambda *args, **kwargs: "layerwise")
    report = adaconvert.verify(tmp_path / "source", nulled(name))
    assert report.equivalence is not None
    assert report.equivalence.logits.max_abs_diff == 0
    assert [note for note in report.notes if "with null experts off; they were not run" in note]
