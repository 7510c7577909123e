"""kernels/bench: rows, what keeps one from being written, and the README made of them."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import MixtralConfig, MixtralForCausalLM

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "kernels" / "bench"
OPS = (
    *("route_plan", "router_select", "grouped_ffn", "dynk_decode"),
    *("lora", "cross_entropy", "token_rows"),
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield what imports a script by its name, and forget the scripts afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
            del sys.modules[name]


def small(bench: Any, op: str) -> Any:
    """Return a cell of a few tokens."""
    sizes = {"tokens": 12, "hidden": 16, "width": 8, "experts": 4, "slots": 2}
    return bench("cells").Cell(op=op, dtype=torch.float32, size=8, seconds=20.0, **sizes)


def measured(bench: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """Return what a run of small cells ends with."""
    run, timing = bench("run"), bench("timing")
    monkeypatch.setattr(run, "CPU", [small(bench, op) for op in OPS])
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(timing.Ceilings, "bandwidth", lambda self: 1e10)
    monkeypatch.setattr(timing.Ceilings, "flops", lambda self, dtype: 1e11)
    monkeypatch.setattr(bench("routing_cases"), "ROTATED", {"cpu": 1})
    # without a compiler decoding has one path less
    monkeypatch.setenv("ADACONVERT_COMPILE", "0")
    return CliRunner().invoke(run.main, ["--cpu", *arguments], catch_exceptions=False)


def test_every_operation_gives_whole_rows(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows, run = bench("rows"), bench("run")
    monkeypatch.setattr(run.gate, "red", lambda ops, **_: {})
    done = measured(bench, monkeypatch, "--out", str(tmp_path / "r.csv"))
    assert done.exit_code == 0, done.output
    found = rows.read(tmp_path / "r.csv")
    assert {row["op"] for row in found} == set(OPS) == set(run.BUILDERS)
    assert len({row["run"] for row in found}) == 1
    for row in found:
        assert tuple(row) == rows.FIELDS
        for name in ("commit", "device", "threads", "load", "torch", "transformers", "provider"):
            assert row[name], (name, row)
        assert int(row["rounds"]) >= 20
        low, middle, high = (float(row[f"{name}_us"]) for name in ("low", "median", "high"))
        assert 0 < low <= middle <= high
        assert (row["provider"] == row["baseline"]) <= (row["ratio"] == "1.000")
        assert bool(row["saved_bytes"]) == (row["direction"] == "step")
    text = bench("readme").written(found)
    for title in bench("readme").TITLES.values():
        assert (f"### {title}" in text) == ("whole model" not in title)


def test_providers_of_experts(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = measured(bench, monkeypatch, "--dry", "--ops", "grouped_ffn")
    lines = [line.split("\t") for line in done.output.splitlines() if not line.startswith("#")]
    ran = {line[1] for line in lines}
    stock = {f"transformers {name}" for name in ("grouped_mm", "eager", "batched_mm")}
    own = {f"adaconvert {name}" for name in ("auto", "loop", "grouped_mm")}
    assert ran == stock | own | {"dense, equal FLOPs", "dense, all experts"}
    assert {line[3] for line in lines} == {"forward", "backward", "step"}
    assert "adaconvert triton: not run: triton cannot run this" in done.output
    assert "liger: not run" in done.output


def test_a_red_test_keeps_rows_from_being_written(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = bench("gate")
    (tmp_path / "test_lora.py").write_text("def test_wrong():\n    assert 1 == 2\n")
    (tmp_path / "test_token_rows.py").write_text("def test_right():\n    assert True\n")
    real = gate.red
    monkeypatch.setattr(gate, "red", lambda ops, **how: real(ops, folder=tmp_path, **how))
    out = tmp_path / "r.csv"
    ops = "lora,token_rows,cross_entropy"
    done = measured(bench, monkeypatch, "--out", str(out), "--ops", ops)
    assert done.exit_code == 1
    assert {row["op"] for row in bench("rows").read(out)} == {"token_rows"}
    assert "lora: not measured, its tests are red: FAILED" in done.output
    assert "test_wrong" in done.output
    assert "cross_entropy: not measured, its tests are red: there is no test_cross_entropy.py" in (
        done.output
    )


def test_a_file_without_tests_is_red(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "test_lora.py").write_text("")
    assert "pytest ended with 5" in bench("gate").red(["lora"], folder=tmp_path)["lora"]


def test_every_operation_has_tests(bench: Any) -> None:
    gate = bench("gate")
    assert set(gate.FILES) == set(OPS)
    missing = [name for names in gate.FILES.values() for name in names]
    assert [name for name in missing if not (gate.TESTS / name).exists()] == []


def test_time_that_is_used_up(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench("gate"), "red", lambda ops, **_: {})
    out = tmp_path / "r.csv"
    done = measured(bench, monkeypatch, "--minutes", "0", "--out", str(out))
    assert done.exit_code == 0
    assert not out.exists()
    left = done.output.splitlines()[-1]
    assert left.startswith("not measured, no time left: route_plan")
    assert all(op in left for op in OPS)


def test_rounds_that_do_not_suffice_give_no_row(bench: Any) -> None:
    timing, run = bench("timing"), bench("run")
    provider = timing.Provider(name="a", forward=lambda _: torch.ones(1))
    case = timing.Case(providers=[provider], recorded=False)
    assert len(timing.measure(case, "cpu", 0.0)["a"].get("forward", [])) < 20
    found = run.Run("cpu", None).rows_of(small(bench, "lora"), case, 0.0)
    assert found == []


def test_a_wrong_result_is_not_measured(bench: Any) -> None:
    timing = bench("timing")

    def fails(_: int) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    ways = {"a": lambda _: torch.ones(3), "b": lambda _: torch.zeros(3), "c": fails}
    providers = [timing.Provider(name=name, forward=way) for name, way in ways.items()]
    right = timing.Provider(name="d", forward=lambda _: torch.ones(3) + 1e-6)
    found = timing.wrong(timing.Case(providers=[*providers, right]))
    assert set(found) == {"b", "c"}
    assert found["c"] == "no such kernel"


def test_unknown_operations_and_calls_without_a_gpu(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = measured(bench, monkeypatch, "--dry", "--ops", "lora,lore")
    assert done.exit_code == 2
    assert "no operation 'lore'; expected one of route_plan" in done.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(bench("run").main, ["--call", "1"])
    assert done.exit_code == 2
    assert "--call needs a GPU" in done.output


def test_other_columns_are_not_added_to(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("run,commit\n")
    with pytest.raises(ValueError, match="has other columns"):
        bench("rows").append(path, {})


def test_cells_name_known_operations(bench: Any) -> None:
    cells = bench("cells")
    listed = [*cells.CPU, *(cell for call in cells.CALLS.values() for cell in call)]
    assert {cell.op for cell in listed} == set(OPS)
    assert {cell.op for cell in cells.CPU} == set(OPS)
    assert len(set(cells.CPU)) == len(cells.CPU)


def test_kept_and_peak_bytes(bench: Any) -> None:
    timing = bench("timing")
    weight, x = torch.randn(64, 64, requires_grad=True), torch.randn(256, 64, requires_grad=True)

    def forward(_: int = 0) -> torch.Tensor:
        # exp keeps its result, the product x and the weight
        return (x @ weight).exp()

    size = 256 * 64 * 4
    assert timing.saved_bytes(forward, [weight]) == 2 * size
    assert timing.saved_bytes(forward, []) == 2 * size + 64 * 64 * 4
    provider = timing.Provider(name="a", forward=forward)
    with torch.no_grad():
        assert timing.peak_bytes(provider, "cpu") == 2 * size


@pytest.mark.parametrize("op", ["route_plan", "router_select", "grouped_ffn", "dynk_decode"])
def test_the_contract_holds_on_this_device(
    bench: Any, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = bench("contract")
    monkeypatch.setattr(contract, "SHAPES", contract.SHAPES[:3])
    assert contract.broken([op], "cpu", kernels=False) == {}


def test_the_contract_fails_for_zeros(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = bench("contract")
    monkeypatch.setattr(contract, "SHAPES", contract.SHAPES[:1])

    def zeros(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return sum((t.sum() * 0 for t in (args[0], options["gate_up"], options["down"])), x * 0)

    monkeypatch.setattr(contract.grouped, "grouped_ffn", zeros)
    found = contract.broken(["grouped_ffn"], "cpu", kernels=False)
    assert "is 1.0e+00 from the reference" in found["grouped_ffn"]


def test_kernels_readme_is_what_the_rows_give(bench: Any) -> None:
    readme = bench("readme")
    found = readme.written(bench("rows").read(bench("rows").RESULTS))
    assert readme.README.read_text(encoding="utf-8") == found, "run kernels/bench/readme.py"


def row_of(bench: Any, **given: str) -> dict[str, str]:
    common = {"run": "2026-01-01T00:00:00Z", "op": "route_plan", "provider": "p", "baseline": "p"}
    times = {"median_us": "2000", "low_us": "1000", "high_us": "3000", "ratio": "0.500"}
    numbers = {"tokens": "8", "direction": "forward", "threads": "1", "dtype": "float32"}
    named = {**common, **times, **numbers, **given}
    return {name: named.get(name, "") for name in bench("rows").FIELDS}


def test_readme_of_rows(bench: Any) -> None:
    written = bench("readme").written
    old = row_of(bench, device="Some CPU", ratio="0.700")
    new = row_of(bench, device="Some CPU", run="2026-02-01T00:00:00Z")
    text = written([old, new])
    assert "| T=8, float32 | p | 2 | 0.50 | 1-3 |" in text
    assert "0.70" not in text
    assert "There are no rows of a GPU" in text
    gpu = row_of(bench, device="Some GPU", capability="9.0", driver="550")
    text = written([gpu, new])
    assert "There are no rows of a GPU" not in text
    assert "Some GPU, driver 550" in text


def test_a_training_step_of_a_small_mixture(bench: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    out = tmp_path / "r.csv"
    arguments = [str(tmp_path / "moe"), "--tokens", "32", "--rounds", "3", "--out", str(out)]
    before = torch.get_num_threads()
    step = bench("train_step")
    done = CliRunner().invoke(
        step.main, [*arguments, "--threads", str(before)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    found = bench("rows").read(out)
    assert [row["provider"] for row in found[::3]] == list(step.IMPLEMENTATIONS)
    kept = {row["provider"]: int(row["saved_bytes"]) for row in found if row["saved_bytes"]}
    assert 0 < kept["adaconvert"] < kept["grouped_mm"]
    assert all(math.isfinite(float(row["ratio"])) for row in found)
    assert {row["baseline"] for row in found} == {"grouped_mm"}


def test_what_decodes_on_a_gpu_computes_the_dense_network(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = bench("routing_cases")
    monkeypatch.setattr(cases, "insisting", lambda call: call)
    monkeypatch.setattr(cases, "ROTATED", {"cpu": 1})
    sizes = {"tokens": 3, "hidden": 16, "width": 8, "experts": 4, "slots": 4}
    cell = bench("cells").Cell(op="dynk_decode", dtype=torch.float32, **sizes)
    layers = cases.Layers(cell, "cpu")
    with torch.no_grad():
        for provider in cases._on_gpu(cell, layers):
            difference = provider.forward(1) - layers.dense(1)
            assert difference.norm() < 1e-5 * layers.dense(1).norm()
