"""scripts/stage5_table.py from a tiny model to rows and a table."""

from __future__ import annotations

import csv
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adaconvert.testing.tiny_models import make

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield import_module("stage5_table")
    for name in [n for n in sys.modules if n == "stage5_table" or n.split(".")[0] == "bench"]:
        del sys.modules[name]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_tiny_model_from_fit_to_table(script: Any, tmp_path: Path) -> None:
    dense = make("llama", tmp_path / "dense")
    text = "def route(token, experts): return sorted(experts)[:2]\n"
    for name in ("a.jsonl", "b.jsonl"):
        lines = [json.dumps({"text": f"{name} {text * n}"}) + "\n" for n in range(3, 9)]
        (tmp_path / name).write_text("".join(lines))
    data = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    shared = [str(dense), "--work", str(tmp_path / "w"), "--csv", str(tmp_path / "s.csv")]
    for where in data:
        shared += ["--train", where]
    quick = ["--layers", "1", "--tokens", "1000", "--steps", "20", "--experts", "4"]
    runner = CliRunner()
    measured = [part for where in data for part in ("--valid", where)]
    arguments = [*shared, *quick, *measured, "--taus", "0.5", "--characters", "200"]
    done = runner.invoke(script.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    found = rows(tmp_path / "s.csv")
    fits = [row for row in found if row["row"] == "fit"]
    assert [(row["layer"], row["projection"]) for row in fits] == [("1", r) for r in "qkvo"]
    for row in fits:
        assert 0 < float(row["linear"]) < float(row["error"]) < 1.5
        assert 0 < float(row["zeros"]) < 1
        assert -1 <= float(row["router_rank"]) <= 1
        assert (row["steps"], row["lr"], row["sparsity"]) == ("20", "0.003", "0.0001")
    base, whole, few = (row for row in found if row["row"] == "loss")
    assert (base["setting"], base["over_dense"], base["flops"]) == ("dense", "0.00000", "")
    assert "all" in whole["setting"]
    assert "tau=0.5" in few["setting"]
    assert float(few["flops"]) < float(whole["flops"]) + 0.5
    assert float(whole["over_dense"]) == pytest.approx(
        float(whole["loss"]) - float(base["loss"]), abs=2e-5
    )
    # each document once, although both texts have as many
    assert {row["documents"] for row in (base, whole, few)} == {"12"}
    assert "| layer | projection | error |" in done.output
    assert "| setting | flops | loss |" in done.output
    # what is there is not made again; other options are another checkpoint
    again = runner.invoke(script.main, arguments, catch_exceptions=False)
    assert "making" not in again.output
    assert "measuring" not in again.output
    fewer = [*shared, *quick, "--steps", "5"]
    assert "making" in runner.invoke(script.main, fewer, catch_exceptions=False).output
    assert len(rows(tmp_path / "s.csv")) == 2 * len(found) + 4
