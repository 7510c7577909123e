"""scripts/null_table.py from tiny models to rows and a table."""

from __future__ import annotations

import csv
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adaconvert import api
from adaconvert.testing.tiny_models import make

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TARGET = 0.7


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield import_module("null_table")
    for name in [n for n in sys.modules if n == "null_table" or n.split(".")[0] == "bench"]:
        del sys.modules[name]


def text(folder: Path, name: str, rows: int) -> str:
    """Return a new file of documents that differ."""
    words = f"def {name.partition('.')[0]}(token, experts): return sorted(experts)[:2] "
    lines = [json.dumps({"text": f"{n} {words[n % 5 :] * (n % 7 + 3)}"}) for n in range(rows)]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def arguments_for(folder: Path) -> list[str]:
    """Return the arguments of a run that takes seconds, its models made."""
    dense = make("llama-tied", folder / "dense0", max_shard_size="1GB")
    found = [str(dense), "--work", str(folder / "w"), "--csv", str(folder / "n.csv")]
    for number in range(4):
        branch, data = folder / f"branch{number}", text(folder, f"slice{number}.train", 12)
        tune = {"tokens": 128, "seq_len": 16, "batch_size": 4, "lr": 1e-2, "seed": number}
        api.finetune(dense, branch, data=data, **tune)
        found += ["--branch", str(branch), "--branch-train", data]
    for domain in ("prose", "tech"):
        found += ["--train", text(folder, f"{domain}.train", 40)]
        found += ["--valid", text(folder, f"{domain}.valid", 6)]
    found += ["--tokens", "256", "--more-tokens", "256", "--seq-len", "32", "--precision", "fp32"]
    found += ["--characters", "150", "--control-tokens", "2000", "--targets", str(TARGET)]
    return found


def rows(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["case"], row["text"]): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_from_branches_to_rows(script: Any, tmp_path: Path) -> None:
    arguments, runner = arguments_for(tmp_path), CliRunner()
    alone = runner.invoke(script.main, [*arguments, "--only", "base"], catch_exceptions=False)
    assert "making mixture" in alone.output
    assert not (tmp_path / "n.csv").exists()
    done = runner.invoke(script.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "making base\n" not in done.output
    found = rows(tmp_path / "n.csv")
    free = [f"free-{TARGET}-{domain}" for domain in ("prose", "tech")]
    stock = ["source", "mixture", "base", "base-top-1", "top-2", "top-1", "dense", "dense-all"]
    models = {*stock, "nulls", f"nulls-{TARGET}", *free}
    assert set(found) == {(model, where) for model in models for where in ("prose", "tech", "all")}
    check_shares(found)
    for model in models:
        row, base = found[model, "all"], found["base", "all"]
        rise = float(row["loss"]) - float(base["loss"])
        assert float(row["over_base"]) == pytest.approx(rise, abs=2e-5)
        assert row["documents"] == "12"
    # the same tokens, and all of them told
    assert {found[model, "all"]["tokens"] for model in ("top-2", "top-1", "dense")} == {"256"}
    again = runner.invoke(script.main, [*arguments, "--rows"], catch_exceptions=False)
    assert "making" not in again.output
    assert "measuring" not in again.output
    assert "| nulls-0.7 |" in again.output


def check_shares(found: dict[tuple[str, str], dict[str, str]]) -> None:
    """What ran is what the models are for."""
    for model, share in {"top-2": 1.0, "top-1": 0.5, "dense": 0.5}.items():
        assert float(found[model, "all"]["share"]) == share
    # null experts that change nothing
    start = found["nulls", "all"]
    assert (start["share"], start["idle"]) == ("1.0000", "0.0000")
    assert abs(float(start["over_base"])) < 1e-5
    assert int(start["ffn_flops_per_token"]) > int(found["base", "all"]["ffn_flops_per_token"])
    for domain in ("prose", "tech"):
        row = found[f"free-{TARGET}-{domain}", domain]
        assert float(row["share"]) == pytest.approx(TARGET, abs=0.05)
        assert (row["target"], row["set_on"]) == (str(TARGET), domain)
        assert len(row["share_by_layer"].split()) == 2
        assert int(row["flops_per_token"]) < int(start["flops_per_token"])


def test_only_the_text_of_an_evaluation_is_compared(script: Any) -> None:
    from bench.null_rows import Measured, misses, rows, table

    def measured(loss: float, share: float) -> Measured:
        losses = {f"prose/{n}": (10, loss * 10 + n) for n in range(3)}
        return Measured(losses=losses, shares=(share, share + 0.2), idle=0.1, flops=9.0, ffn=4.0)

    other = Measured(losses={"tech/0": (30, 90.0)}, shares=(0.2, 0.4), idle=0.3, flops=7.0, ffn=2.0)
    both = Measured.pooled([measured(2.0, 0.5), other])
    assert both.tokens == 60
    assert both.shares == pytest.approx((0.35, 0.55))
    assert (both.idle, both.flops, both.ffn) == pytest.approx((0.2, 8.0, 3.0))
    found = {
        "top-2": {"prose": measured(2.0, 0.9), "all": both},
        "nulls-0.7": {"prose": measured(2.5, 0.6), "all": both},
    }
    made = list(rows(found, Path("nowhere")))
    cut = next(row for row in made if (row["case"], row["text"]) == ("nulls-0.7", "prose"))
    assert (cut["over_top2"], cut["over_top2_se"]) == ("0.50000", "0.00000")
    assert (cut["target"], cut["least_share"], cut["most_share"]) == ("0.7", "0.6000", "0.8000")
    # no rival that was not measured
    assert "over_top1" not in cut
    assert len(list(table(made))) == 4
    assert list(misses(made)) == ["- nulls-0.7: +0.0000 on prose, -0.2500 on all"]


def test_names_tell_the_target_and_the_text(script: Any) -> None:
    from bench.null_rows import named

    assert named("nulls-0.85") == named("nulls-0.85-distilled") == {"target": "0.85"}
    assert named("free-0.5-tech") == {"target": "0.5", "set_on": "tech"}
    assert named("nulls") == named("top-2") == named("base-top-1") == {}
