"""The arithmetic of scripts/granularity_table.py: levels, selections, paired differences."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script or a part of one."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield import_module
    for name in [n for n in sys.modules if n == "granularity_table" or n.split(".")[0] == "bench"]:
        del sys.modules[name]


def test_every_cell_costs_its_level(module: Any) -> None:
    cells = module("bench.granularity_cells")
    shape = cells.Shape(hidden=576, neurons=1536, gated=True)
    found = list(cells.cells(shape, full=True))
    assert len({cell.name for cell in found}) == len(found)
    short = list(cells.cells(shape))
    assert len({cell.name for cell in short}) == len(short)
    # every level that is measured has its baseline
    levels = {cell.level for cell in short if cell.split != "dense"}
    assert levels == {cell.level for cell in short if cell.split == "static"}
    for cell in [*found, *short]:
        if cell.split not in ("dense", "static"):
            assert shape.flops(cell, shape.share(cell)) == pytest.approx(min(cell.level, 1.0))
    # the gate alone is a third of a gated FFN
    gate = cells.Cell(split="none", width=1, router="gate", rule="top-k", level=0.5)
    assert shape.share(gate) == pytest.approx(0.25)
    assert not [c for c in found if c.router == "gate" and c.level < 1 / 3]


def test_rules_choose_as_the_runtime_does(module: Any) -> None:
    run, cells = module("bench.granularity_run"), module("bench.granularity_cells")
    values = torch.tensor([[0.0, 4.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.5]])

    def chosen(rule: str, share: float, limit: float, arrays: dict[str, Any]) -> list[int]:
        cell = cells.Cell(split="none", width=1, router="gate", rule=rule, level=0.5)
        return run._select(values, cell, share, limit, arrays).sum(dim=1).tolist()

    assert chosen("top-k", 0.5, 0, {}) == [2, 2]
    assert chosen("top-k", 0.1, 0, {}) == [1, 1]
    assert chosen("dynamic-k", 0, 0.5, {}) == [2, 1]
    assert chosen("dynamic-k", 0, 1.0, {}) == [1, 1]
    fit = module("bench.granularity_fit")
    name = fit.key("scores", "none", 1, "gate")
    # nine of ten pairs reach 0, half of them 2: what contributes nothing never runs
    reached = fit.numpy.interp(fit.POINTS, [0.0, 0.5, 0.9, 1.0], [4.0, 2.0, 0.0, 0.0])
    assert chosen("threshold", 0.5, 0, {name: reached}) == [2, 1]
    assert chosen("threshold", 1.0, 0, {name: reached}) == [3, 1]


def test_tau_is_found_for_a_share_of_all_layers(module: Any) -> None:
    fit, cells = module("bench.granularity_fit"), module("bench.granularity_cells")
    cell = cells.Cell(split="none", width=1, router="gate", rule="dynamic-k", level=0.5)
    name = fit.key("ratios", "none", 1, "gate")
    layers = [{name: 1 - fit.POINTS}, {name: 1 - fit.POINTS**2}]
    tau = fit.tau(layers, cell, 0.5)
    # shares running at tau: 1 - tau in one layer, sqrt(1 - tau) in the other
    assert (1 - tau + (1 - tau) ** 0.5) / 2 == pytest.approx(0.5, abs=1e-3)


def test_differences_are_paired_by_document(module: Any) -> None:
    paired = module("granularity_table").paired
    mine = {"a": [30.0, 10.0], "b": [50.0, 20.0]}
    other = {"a": [20.0, 10.0], "b": [30.0, 20.0]}
    # one nat per token in every document: no spread
    assert paired(mine, other) == ("1.00000", "0.00000")
    assert paired(mine, None) == ("", "")
    assert paired(mine, {"a": [1.0, 1.0]}) == ("", "")
    mean, error = paired({"a": [30.0, 10.0], "b": [30.0, 20.0]}, other)
    assert mean == f"{1 / 3:.5f}"
    # residuals 10 - 10/3 and 0 - 20/3, times sqrt(2), over 30 tokens
    assert float(error) == pytest.approx((2 * 2 * (20 / 3) ** 2) ** 0.5 / 30, abs=1e-5)


def test_a_tiny_model_from_fit_to_table(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import json

    from adaconvert.testing.tiny_models import make

    folder = make("llama", tmp_path / "m", intermediate_size=96)
    text = "def route(token, experts): return sorted(experts)[:2]\n"
    data = tmp_path / "t.jsonl"
    data.write_text("".join(json.dumps({"text": text * n}) + "\n" for n in range(3, 9)))
    script = module("granularity_table")
    arguments = [
        *("x", str(folder), "--train", str(data), "--valid", f"prose={data}"),
        *("--work", str(tmp_path / "w"), "--csv", str(tmp_path / "g.csv"), "--dtype", "float32"),
        *("--steps", "5", "--tokens", "300", "--train-tokens", "600"),
        *("--only", "(random|balanced-kmeans)/6/(oracle|gate|contribution)/|none/1/oracle"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert script.main() == 0
    rows = script.read(tmp_path / "g.csv")
    dense = next(row for row in rows if row["split"] == "dense")
    assert (dense["rise"], float(dense["ffn_flops"])) == ("0.00000", 1.0)
    oracle = [r for r in rows if (r["width"], r["router"], r["level"]) == ("1", "oracle", "0.7")]
    assert float(oracle[0]["neurons"]) == pytest.approx(0.7, abs=0.01)
    assert "| random | 6 | oracle | top-k | 0.50 |" in capsys.readouterr().out
    # a second run measures nothing again
    assert script.main() == 0
    assert len(script.read(tmp_path / "g.csv")) == len(rows)
