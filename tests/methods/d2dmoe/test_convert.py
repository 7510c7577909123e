"""`d2dmoe` end to end on tiny models: each stage alone, exactness, routers, resume, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.cli.main import run
from adaconvert.data.text import read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.errors import DataError, InterruptedRunError, OptionError, SourceError
from adaconvert.io import manifest
from adaconvert.layerwise.ffn_data import ffn_layers
from adaconvert.layerwise.ffn_weights import ExpertNorms
from adaconvert.methods.d2dmoe.router import scores
from adaconvert.testing.tiny_models import make

TEXT = "def route(token, experts):\n    return sorted(experts, key=lambda e: e.score(token))[:2]\n"
QUICK: dict[str, Any] = {"router_width": 16, "router_steps": 40, "data_tokens": 2000}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT * (i + 2)}) + "\n" for i in range(8)))
    return path


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def slots(folder: Path) -> list[dict[str, Any]]:
    return [site["ffn"] for site in config_of(folder)["adaptive"]["sites"].values()]


def digests(folder: Path) -> list[str]:
    return [record.digest for record in manifest.records(manifest.read(folder)).values()]


def logits(folder: Path, tau: float | None = None) -> torch.Tensor:
    from adaconvert.modeling.loading import load_model

    model = load_model(folder, dtype="float32")
    if tau is not None:
        model.set_select("dynamic-k", tau=tau)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(40)[None] * 7 % 300).logits
    return found


@pytest.mark.parametrize(
    ("family", "extra"),
    [("llama", {}), ("gpt2", {"activation_function": "relu"}), ("phi3", {}), ("gpt_neox", {})],
)
def test_every_stage_together_is_exact_until_tau_says_otherwise(
    family: str, extra: dict[str, object], data: Path, tmp_path: Path
) -> None:
    source = make(family, tmp_path / "m", **extra)
    result = api.d2dmoe(source, tmp_path / "d", data=str(data), expert_width=8, **QUICK)
    assert result.conversion.to_json()["plan"]["exactness"]["kind"] == "exact"  # type: ignore[index]
    assert len(result.routers) == 2
    for slot in slots(tmp_path / "d"):
        assert slot["select"] == {"rule": "dynamic-k", "tau": 0.0}
        assert slot["router"]["kind"] == "contribution"
        assert slot["router"]["width"] == 16
    dense = logits(source)
    # a permutation of neurons: sums in another order
    limit = 1e-5 * dense.abs().max().item()
    assert (logits(tmp_path / "d") - dense).abs().max().item() <= limit
    assert (logits(tmp_path / "d", tau=1.0) - dense).abs().max().item() > limit
    api.unmoefy(tmp_path / "d", tmp_path / "u")
    from safetensors.torch import load_file

    for file in sorted(source.glob("*.safetensors")):
        restored = {
            k: v for f in (tmp_path / "u").glob("*.safetensors") for k, v in load_file(f).items()
        }
        for name, tensor in load_file(file).items():
            assert torch.equal(restored[name], tensor), name


def test_the_stored_router_predicts_the_contributions_it_was_fitted_to(
    data: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    source = make("llama", tmp_path / "m")
    options = {**QUICK, "router_steps": 400, "router_width": 64}
    api.d2dmoe(source, tmp_path / "d", data=str(data), expert_width=8, **options)
    stored = {k: v for f in (tmp_path / "d").glob("*.safetensors") for k, v in load_file(f).items()}
    blocks = token_blocks(read_documents(data), source, max_tokens=2000)
    for layer in ffn_layers(source, blocks):
        site = f"model.layers.{layer.index}.mlp"
        order = stored[f"{site}.neuron_order"].long().numpy()
        true = ExpertNorms.of(layer.weights, order, width=8)(layer.weights.hidden(layer.inputs))
        w1, w2 = stored[f"{site}.router.w1"], stored[f"{site}.router.w2"]
        guessed = scores(layer.inputs, w1, w2)
        rest = (true - guessed).square().sum() / (true - true.mean(0)).square().sum()
        assert rest < 0.5
        quality = slots(tmp_path / "d")[layer.index]["router"]["quality"]
        assert quality["spearman"] > 0.6
        assert quality["captured"]["E/2"] > quality["constant"]["E/2"]


def test_the_runtime_scores_as_the_fit_does(data: Path, tmp_path: Path) -> None:
    from adaconvert.modeling.loading import load_model

    source = make("llama", tmp_path / "m")
    api.d2dmoe(source, tmp_path / "d", data=str(data), expert_width=8, **QUICK)
    model = load_model(tmp_path / "d", dtype="float32")
    seen: dict[str, torch.Tensor] = {}
    for path, site in model.adaptive_sites().items():
        site.register_forward_pre_hook(lambda m, a, p=path: seen.__setitem__(p, a[0][0]))
    with torch.no_grad(), model.collect("router_scores") as got:
        model(torch.arange(40)[None] * 7 % 300)
    for path, site in model.adaptive_sites().items():
        expected = scores(seen[path], site.router.w1, site.router.w2)
        found = torch.cat(list(got[path]))
        assert (found - expected).abs().max() <= 1e-6 * expected.max()


def test_fewer_experts_run_as_tau_grows(data: Path, tmp_path: Path) -> None:
    from adaconvert.modeling.loading import load_model

    api.d2dmoe(make("llama", tmp_path / "m"), tmp_path / "d", data=str(data), **QUICK)
    model = load_model(tmp_path / "d", dtype="float32")
    uses = []
    for tau in (0.0, 0.3, 0.6, 0.9, 1.0):
        with model.set_select("dynamic-k", tau=tau), torch.no_grad(), model.account() as account:
            model(torch.arange(40)[None] * 7 % 300)
        uses.append(sum(int(site.experts.sum()) for site in account.sites.values()))
    assert uses == sorted(uses, reverse=True)
    # two layers, two experts of 32, 40 tokens: all, then one each
    assert (uses[0], uses[-1]) == (160, 80)


def test_the_same_options_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        api.d2dmoe(source, tmp_path / name, data=str(data), expert_width=8, seed=seed, **QUICK)
        found.append(digests(tmp_path / name))
    assert found[0] == found[1] != found[2]
    assert (tmp_path / "a" / "config.json").read_bytes() == (
        tmp_path / "b" / "config.json"
    ).read_bytes()


def test_each_stage_alone(data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    api.d2dmoe(source, tmp_path / "s2", stages="2", expert_width=8)
    assert slots(tmp_path / "s2")[0]["router"] == {"kind": "none"}
    assert slots(tmp_path / "s2")[0]["select"] == {"rule": "all"}
    api.d2dmoe(tmp_path / "s2", tmp_path / "s3", stages="3", data=str(data), **QUICK)
    assert slots(tmp_path / "s3")[0]["router"]["kind"] == "contribution"
    assert slots(tmp_path / "s3")[0]["select"] == {"rule": "all"}
    api.d2dmoe(tmp_path / "s3", tmp_path / "s4", stages="4", tau=0.4)
    assert slots(tmp_path / "s4")[0]["router"] == slots(tmp_path / "s3")[0]["router"]
    assert slots(tmp_path / "s4")[0]["select"] == {"rule": "dynamic-k", "tau": 0.4}
    at_once = api.d2dmoe(source, tmp_path / "d", data=str(data), expert_width=8, tau=0.4, **QUICK)
    # the same split and the same routers, on the way over two checkpoints and at once
    assert torch.equal(logits(tmp_path / "s4"), logits(tmp_path / "d"))
    assert at_once.conversion.to_json()["plan"]["exactness"]["kind"] == "approximate"  # type: ignore[index]
    for folder, before in (("s3", "s2"), ("s4", "s3")):
        # raises where they differ
        api.verify(tmp_path / before, tmp_path / folder)


def test_unmoefy_claims_nothing_about_weights_it_cannot_know(data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    api.d2dmoe(source, tmp_path / "s2", stages="2", expert_width=8)
    api.d2dmoe(tmp_path / "s2", tmp_path / "s3", stages="3", data=str(data), **QUICK)
    told = "\n".join(api.unmoefy(tmp_path / "s2", tmp_path / "u2").lines())
    assert "every tensor is, bit for bit, that of m" in told
    assert "changed since" not in "\n".join(api.unmoefy(tmp_path / "s3", tmp_path / "u3").lines())


def test_a_moefied_checkpoint_gets_another_router(data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    api.convert(source, destination=tmp_path / "s", method="moefy", expert_width=8, top_k=4)
    api.d2dmoe(tmp_path / "s", tmp_path / "d", stages="3", data=str(data), layers="1", **QUICK)
    first, second = slots(tmp_path / "d")
    assert first["router"] == {"kind": "param-center"}
    assert second["router"]["kind"] == "contribution"
    assert second["select"] == {"rule": "top-k", "k": 4}
    dropped = manifest.read(tmp_path / "d")["dropped"]
    assert [d["tensor"] for d in dropped] == ["model.layers.1.mlp.router.weight"]  # type: ignore[union-attr,index]
    assert logits(tmp_path / "d").isfinite().all()
    api.unmoefy(tmp_path / "d", tmp_path / "u")
    assert torch.equal(logits(tmp_path / "u"), logits(source))


def test_thresholds_and_calibrations_of_another_router_do_not_survive(
    data: Path, tmp_path: Path
) -> None:
    source = make("llama", tmp_path / "m")
    api.convert(
        source,
        destination=tmp_path / "s",
        method="moefy",
        expert_width=8,
        rule="threshold",
        threshold=0.125,
    )
    api.d2dmoe(tmp_path / "s", tmp_path / "d", stages="3", data=str(data), **QUICK)
    assert slots(tmp_path / "d")[0]["select"] == {"rule": "all"}
    assert config_of(tmp_path / "d")["adaptive"]["calibration"] is None


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("m", {"stages": "3"}, "the source is not split"),
        ("s", {}, "the source is split already.*unmoefy"),
        ("s", {"stages": "3", "layers": "0-1", "device": "warp"}, "--device: cannot be used"),
    ],
)
def test_stages_that_do_not_fit_the_source(
    source: str, options: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    make("llama", tmp_path / "m")
    if source == "s":
        api.d2dmoe(tmp_path / "m", tmp_path / "s", stages="2")
    with pytest.raises(OptionError, match=message):
        api.d2dmoe(tmp_path / source, tmp_path / "d", data=str(data), **QUICK, **options)
    assert not (tmp_path / "d").exists()


def test_selecting_needs_a_router(tmp_path: Path) -> None:
    api.d2dmoe(make("llama", tmp_path / "m"), tmp_path / "s", stages="2")
    with pytest.raises(OptionError, match="has no router to select by"):
        api.d2dmoe(tmp_path / "s", tmp_path / "d", stages="4", tau=0.5)


def test_data_that_cannot_be_used_leave_nothing_behind(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    (tmp_path / "other.jsonl").write_text('{"body": "words"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("other", "empty", "missing"):
        with pytest.raises(DataError, match=name):
            api.d2dmoe(source, tmp_path / "d", data=str(tmp_path / f"{name}.jsonl"), **QUICK)
    (tmp_path / "few.jsonl").write_text('{"text": "a few words"}\n')
    message = r"--data: too little text to fit routers on; expected 256 tokens or more.*found \d+\."
    with pytest.raises(DataError, match=message):
        api.d2dmoe(source, tmp_path / "d", data=str(tmp_path / "few.jsonl"), **QUICK)
    left = ["empty.jsonl", "few.jsonl", "m", "other.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_states_that_are_not_finite_leave_nothing_behind(data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make("llama", tmp_path / "m", max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] *= 1e30
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1e30
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="after block 1 hold NaN or infinity"):
        api.d2dmoe(source, tmp_path / "d", data=str(data), **QUICK)
    assert not (tmp_path / "d").exists()


def test_a_killed_run_goes_on_from_its_work_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, work = make("llama", tmp_path / "m", layers=3), tmp_path / "w"
    options = {**QUICK, "data": str(data), "expert_width": 8}
    api.d2dmoe(source, tmp_path / "whole", **options)
    fit_module = import_module("adaconvert.methods.d2dmoe.fit")
    real: Callable[..., Any] = fit_module.fit_layer_router
    fitted: list[int] = []

    def stop_at(last: int) -> Callable[..., Any]:
        def fit(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if layer.index == last:
                raise KeyboardInterrupt
            fitted.append(layer.index)
            return real(layer, *args, **kwargs)

        return fit

    monkeypatch.setattr(fit_module, "fit_layer_router", stop_at(2))
    kept = r"interrupted\. 2 fitted layers are kept in --work w: run the same command to go on"
    with pytest.raises(InterruptedRunError, match=kept):
        api.d2dmoe(source, tmp_path / "d", work=str(work), **options)
    with pytest.raises(InterruptedRunError, match="so nothing was kept"):
        api.d2dmoe(source, tmp_path / "d", **options)
    fitted[2:] = []
    assert not (tmp_path / "d").exists()
    monkeypatch.setattr(fit_module, "fit_layer_router", stop_at(9))
    api.d2dmoe(source, tmp_path / "d", work=str(work), **options)
    assert fitted == [0, 1, 2]
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")
    # no hidden states are left, and another tau needs no fit
    assert not list(work.glob("*.bin"))
    api.d2dmoe(source, tmp_path / "e", work=str(work), tau=0.5, **options)
    assert fitted == [0, 1, 2]
    with pytest.raises(OptionError, match="belongs to another run"):
        api.d2dmoe(source, tmp_path / "f", work=str(work), **{**options, "router_steps": 41})


def test_the_command_prints_the_quality_of_every_router(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make("llama", tmp_path / "m")
    arguments = [str(source), str(tmp_path / "d"), "--data", str(data), "--router-steps", "20"]
    assert run(["d2dmoe", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found["routers"]) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for quality in found["routers"].values():
        assert set(quality) == {"r2", "spearman", "captured", "constant", "tokens"}
    assert str(tmp_path) not in (tmp_path / "d" / "adaconvert.json").read_text()
    assert run(["plan", "d2dmoe", *arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["options"]["num_experts"] == 2
    assert any("silu has no exact zeros" in note for note in plan["notes"])
    assert run(["d2dmoe", *arguments, "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("model.layers.0.mlp")
    assert "held-out tokens: rank correlation" in text
