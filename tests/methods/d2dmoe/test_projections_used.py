"""Networks in place of projections are inspected, measured, calibrated, verified, trained and
refused like split ones, by the API and by the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.cli.main import run
from adaconvert.errors import OptionError, SourceError
from adaconvert.io import manifest
from adaconvert.modeling.loading import load_model
from adaconvert.testing.projections import QUICK, ffn, sites, tensors
from adaconvert.testing.tiny_models import make

IDS = torch.arange(40)[None] * 7 % 300


def test_the_dense_model_cannot_be_had_back(made: Callable[..., Path], tmp_path: Path) -> None:
    for folder in (made(stages="5"), made(stages="2,3,4,5", expert_width=8, tau=0.2)):
        message = r"whose weights are gone: model\.layers\.0\.self_attn\.[qkvo]_proj.* and 5 more"
        with pytest.raises(OptionError, match=message):
            api.unmoefy(folder, tmp_path / "u")
        with pytest.raises(SourceError, match="is already adaptive"):
            api.convert(folder, destination=tmp_path / "u", method="moefy")
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {}, r"--projections q: gpt2 keeps q in one matrix with others \(.*c_attn"),
        ("phi3", {"projections": "v"}, r"keeps v in one matrix .*qkv_proj.*Use --projections o"),
        ("gpt_neox", {"projections": "o,k"}, "--projections k: gpt_neox keeps k in one matrix"),
        ("bert", {}, "--stages 5: bert is an encoder; its projections cannot be run"),
        (
            "llama",
            {"projection_experts": 11},
            r"--projection-experts: model\.layers\.0.*at most 10",
        ),
        ("llama", {"stages": "3,5"}, "the source is not split; expected stage 2 among them, or 5"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    family: str, options: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    source = make(family, tmp_path / "m")
    given = {**QUICK, "stages": "5", "data": str(data), **options}
    with pytest.raises(OptionError, match=message):
        api.d2dmoe(source, tmp_path / "d", **given)
    with pytest.raises(OptionError, match=message):
        api.plan(source, method="d2dmoe", **given)


def test_what_was_replaced_is_not_replaced_again(
    made: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    source = made(stages="5")
    options = {**QUICK, "data": str(data)}
    with pytest.raises(OptionError, match=r"q_proj was replaced before; expected 3, 4 or 3,4"):
        api.d2dmoe(source, tmp_path / "d", stages="5", **options)
    with pytest.raises(OptionError, match="stage 2 splits dense models"):
        api.d2dmoe(source, tmp_path / "d", stages="2,3,4", **options)


def test_it_is_inspected_evaluated_and_calibrated(
    made: Callable[..., Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = made(stages="2,3,4,5", expert_width=8, tau=0.2)
    text = "\n".join(api.inspect(both).lines())
    assert "networks in place of q, k, v, o in 2 of 2 blocks, 4 experts each, mean relative" in text
    assert not api.inspect(both).problems
    rows = {"set_compute": (0.95,), "select": ("rule=dynamic-k,tau=0.5",)}
    found = api.evaluate(both, data=str(data), length=64, max_tokens=1000, speed=False, **rows)
    assert "in projections" in "\n".join(found.lines())
    costs = [row["compute"] for row in found.to_json()["settings"]]  # type: ignore[union-attr]
    assert all(cost["projection_flops_per_token"] > 0 for cost in costs)
    assert costs[0]["fraction_of_reference"] <= 0.95
    options = {"budget": 0.97, "length": 32, "max_tokens": None, "unit": "block"}
    api.calibrate(both, data, destination=tmp_path / "c", **options)
    chosen = json.loads((tmp_path / "c" / "config.json").read_text())["adaptive"]["calibration"]
    row = chosen["rows"][chosen["chosen"]]["select"]
    for path, spec in {**sites(tmp_path / "c"), **ffn(tmp_path / "c")}.items():
        assert spec["select"] == (row.get(path) or row["*"])
    model: Any = load_model(tmp_path / "c", dtype="float32")
    with torch.no_grad(), model.set_compute(0.97), model.account() as account:
        model(IDS)
    assert account.sites["model.layers.0.self_attn.v_proj"].tokens == 40
    assert not any("does not hold" in note for note in api.inspect(tmp_path / "c").notes)
    capsys.readouterr()


def test_verification_block_by_block_is_that_of_the_whole(
    made: Callable[..., Path],
) -> None:
    from adaconvert.verification.equivalence import compare
    from adaconvert.verification.tokens import Probe

    both = made(stages="2,3,4,5", expert_width=8, tau=0.2)
    probe = Probe(ids=(tuple(IDS[0].tolist()),), origin="numbers", text="")
    whole = compare(made(), both, probe=probe)
    assert whole.mode == "whole"
    from adaconvert.io.source import Source
    from adaconvert.verification.memory import layerwise_need

    opened = (Source.open(made()), Source.open(both))
    layerwise = compare(made(), both, probe=probe, memory=layerwise_need(opened, tokens=40))
    assert layerwise.mode == "layerwise"
    assert layerwise.logits.max_abs_diff == pytest.approx(whole.logits.max_abs_diff, rel=1e-4)
    assert layerwise.layers == pytest.approx(whole.layers, rel=1e-4)


def test_it_can_be_trained(made: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    source = made(stages="5")
    options = {"steps": 2, "seq_len": 32, "batch_size": 2, "device": "cpu", "lr": 1e-3}
    losses = {"balance": 0.01, "router_regression": 0.1, "select": "rule=top-k,k=2"}
    api.finetune(source, tmp_path / "t", data=[data], **options, **losses)
    before, after = tensors(source), tensors(tmp_path / "t")
    assert set(before) == set(after)
    for name in ("up.weight", "down.weight", "router.w1", "router.w2"):
        path = f"model.layers.0.self_attn.q_proj.{name}"
        assert not torch.equal(before[path], after[path])
    assert sites(tmp_path / "t")["model.layers.0.self_attn.q_proj"]["experts"]["count"] == 4


def test_the_command_prints_how_good_every_network_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make("llama", tmp_path / "m")
    arguments = [str(source), str(tmp_path / "d"), "--data", str(data), "--stages", "5"]
    arguments += ["--projections", "v", "--projection-steps", "20", "--router-steps", "20"]
    assert run(["d2dmoe", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["routers"]
    first = found["networks"]["model.layers.0.self_attn.v_proj"]
    assert set(first) == {"distilled", "router"}
    assert set(first["distilled"]) == {"error", "linear", "zeros", "tokens"}
    assert run(["plan", "d2dmoe", *arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["options"]["projections"] == "v"
    assert any("their matrices are not kept" in note for note in plan["notes"])
    assert run(["d2dmoe", *arguments, "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("model.layers.0.self_attn.v_proj relative error")
    assert "networks in place of v, " in text
    notes = " ".join(str(note) for note in manifest.read(tmp_path / "d")["notes"])  # type: ignore[union-attr]
    assert "squared error" in notes
    assert str(tmp_path) not in (tmp_path / "d" / "adaconvert.json").read_text()
