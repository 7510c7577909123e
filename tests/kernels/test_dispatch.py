"""Which kernel is chosen, how the environment overrides it, and how that is explained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from torch.nn import functional

from adaconvert.kernels import dispatch, measured, triton_support
from adaconvert.kernels.reference import expert_ffn
from adaconvert.modeling import adaptive_execution
from adaconvert.modeling.adaptive_execution import ExpertWeights, run_experts


def kernel(refuses: str | None = None, loses: str | None = None) -> dispatch.Kernel:
    return dispatch.Kernel(
        backend="triton",
        call=expert_ffn,
        refuses=lambda facts: refuses,
        loses=lambda facts: loses if facts["tokens"] > 8 else None,
    )


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


def test_without_kernels_torch_runs_and_why_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.KERNELS, "expert_ffn", ())
    assert dispatch.select("expert_ffn", device="cpu") is None
    assert dispatch.why("expert_ffn") == "expert_ffn: torch, because no kernel is installed for it"
    assert dispatch.refuses("expert_ffn") == "no kernel is installed for it"


def test_unknown_value_of_the_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="ADACONVERT_KERNELS is 'cuda'; expected one of auto"):
        dispatch.select("expert_ffn")
    with pytest.raises(ValueError, match="ADACONVERT_KERNELS"):
        dispatch.why("expert_ffn")


def test_unknown_operation_is_an_error() -> None:
    with pytest.raises(KeyError, match="no_such_op"):
        dispatch.select("no_such_op")


@pytest.mark.parametrize(
    ("value", "tokens", "chosen", "reason"),
    [
        ("auto", 1, True, "triton, because ADACONVERT_KERNELS=auto"),
        ("auto", 64, False, "torch, because triton: too many tokens"),
        ("triton", 64, True, "triton, because ADACONVERT_KERNELS=triton"),
        ("torch", 1, False, "torch, because ADACONVERT_KERNELS=torch"),
        ("", 1, True, "triton, because ADACONVERT_KERNELS=auto"),
    ],
)
def test_the_variable_decides_and_facts_decide_auto(
    monkeypatch: pytest.MonkeyPatch, value: str, tokens: int, chosen: bool, reason: str
) -> None:
    monkeypatch.setitem(dispatch.KERNELS, "expert_ffn", (kernel(loses="too many tokens"),))
    monkeypatch.setenv(dispatch.VARIABLE, value)
    found = dispatch.select("expert_ffn", tokens=tokens)
    assert (found is expert_ffn) is chosen
    assert dispatch.why("expert_ffn", tokens=tokens).startswith(f"expert_ffn: {reason}")


def test_insisting_on_a_kernel_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.KERNELS, "expert_ffn", (kernel(refuses="odd width"),))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(
        RuntimeError, match=r"ADACONVERT_KERNELS=triton, but expert_ffn cannot: .*odd"
    ):
        dispatch.select("expert_ffn", tokens=1)
    assert "torch, because triton: odd width" in dispatch.why("expert_ffn", tokens=1)


def test_nothing_is_chosen_while_the_caller_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.KERNELS, "expert_ffn", (kernel(),))

    def chooses(x: torch.Tensor) -> torch.Tensor:
        found = dispatch.select("expert_ffn", tokens=x.shape[0])
        return x + (0 if found is None else 1)

    for tokens in (1, 3):
        x = torch.zeros(tokens, 2)
        traced = torch.compile(chooses, fullgraph=True, dynamic=True, backend="eager")
        assert not traced(x).any()
        assert chooses(x).all()


# -- the measured table


def row(**changes: Any) -> measured.Row:
    known: dict[str, Any] = {
        "op": "expert_ffn",
        "capability": (9, 0),
        "ratio": 1.5,
        "source": "csv",
    }
    return measured.Row(**known | changes)


def facts(**changes: Any) -> dict[str, Any]:
    return {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "tokens": 2} | changes


@pytest.mark.parametrize(
    ("rows", "changes", "reason"),
    [
        ([], {}, "not measured for these sizes on this device; ADACONVERT_KERNELS=triton runs it"),
        ([row()], {}, None),
        ([row()], {"capability": (8, 0)}, "not measured"),
        ([row()], {"device": "cpu"}, "not measured"),
        ([row(op="route_plan")], {}, "not measured"),
        ([row(backend="other")], {}, "not measured"),
        ([row(capability=None)], {"capability": (8, 0)}, None),
        ([row(ratio=1.0)], {}, r"1.00 times torch's speed where it was measured \(csv\)"),
        ([row(sizes={"tokens": (1, 2)})], {}, None),
        ([row(sizes={"tokens": (3, None)})], {}, "not measured"),
        ([row(sizes={"tokens": (None, 1)})], {}, "not measured"),
        ([row(sizes={"experts": (1, None)})], {}, "not measured"),
        ([row(equal={"dtype": (torch.bfloat16, torch.float16)})], {}, None),
        ([row(equal={"dtype": (torch.float32,)})], {}, "not measured"),
        (
            [row(), row(ratio=0.8, sizes={"tokens": (1, 8)}, equal={"dtype": (torch.bfloat16,)})],
            {},
            r"0.80 times torch's speed where tokens is 1 to 8 and dtype is torch.bfloat16 \(csv\)",
        ),
        ([row(ratio=None, sizes={"tokens": (2, None)}), row()], {}, "torch is faster where tokens"),
        ([row(ratio=3.0), row(ratio=2.0)], {}, None),
    ],
)
def test_a_row_decides_where_it_speaks_for_the_call(
    rows: list[measured.Row],
    changes: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measured, "ROWS", tuple(rows))
    found = measured.loses("expert_ffn", "triton", facts(**changes))
    assert found is None if reason is None else re.match(reason, str(found))


def test_a_row_is_all_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "available", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given = facts(grad=False, experts=8)
    assert dispatch.select("expert_ffn", **given) is None
    monkeypatch.setattr(measured, "ROWS", (*measured.ROWS, row()))
    assert dispatch.select("expert_ffn", **given) is not None
    assert dispatch.why("expert_ffn", **given).startswith("expert_ffn: triton")


def test_sizes_of_a_network() -> None:
    known = facts(neurons=8192, hidden=2048, glu=True, width=32, selected=64, shared=128)
    assert measured.sizes_of(known) == {"bytes": 3 * 8192 * 2048 * 2, "share": 2176 / 8192}
    assert measured.sizes_of(known | {"glu": False})["bytes"] == 2 * 8192 * 2048 * 2
    assert measured.sizes_of(known | {"selected": None}) == {"bytes": 3 * 8192 * 2048 * 2}
    assert measured.sizes_of(known | {"selected": 10**6})["share"] == 1
    assert measured.sizes_of(facts()) == {}


def test_no_row_says_that_an_unmeasured_kernel_is_faster() -> None:
    assert all(row.ratio is None or row.source.count(",") >= 2 for row in measured.ROWS)


# -- where Triton runs


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"device": "cpu"}, "it runs on cuda, not on cpu"),
        ({"device": "meta"}, "it runs on cuda, not on meta"),
        ({"capability": (7, 5)}, "compute capability 7.5 is below 8.0"),
        ({"capability": (8, 0)}, None),
        ({"capability": (12, 0)}, None),
        ({"dtype": torch.float64}, "it does not compute torch.float64"),
        ({"dtype": torch.float8_e4m3fn}, "it does not compute torch.float8_e4m3fn"),
        ({"dtype": torch.int64}, None),
        ({"dtype": None}, None),
    ],
)
def test_what_no_triton_kernel_runs(
    changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_support, "available", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_support.refuses(facts(**changes)) == reason


def test_the_interpreter_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "available", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_support.refuses(facts(device="cpu", dtype=torch.float64)) is None
    assert triton_support.refuses(facts(device="meta")) == "the interpreter cannot read meta"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert triton_support.refuses(facts(device="cpu")) == "it runs on cuda, not on cpu"


@pytest.mark.parametrize(
    ("spec", "version", "reason"),
    [
        (None, None, "triton is not installed"),
        # a folder of that name that is no package
        (ModuleSpec("triton", None), None, "triton is not installed"),
        (ModuleSpec("triton", None, origin="x"), "3.5.1", "triton 3.5 is installed; expected 3.6"),
        (ModuleSpec("triton", None, origin="x"), "3.6.0", None),
        (ModuleSpec("triton", None, origin="x"), "3.10.0", None),
        (ModuleSpec("triton", None, origin="x"), "unknown", None),
    ],
)
def test_what_is_installed_decides(
    spec: ModuleSpec | None,
    version: str | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    found = triton_support.available.__wrapped__()
    assert found is None if reason is None else str(found).startswith(reason)


def test_without_triton_torch_runs_and_says_so() -> None:
    """In a process that has no Triton everything imports, runs, and says why no kernel does."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch, because triton: triton is not installed"] * 5


def test_importing_the_kernels_imports_no_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    dropped = (dispatch.VARIABLE, "TRITON_INTERPRET")
    return {name: value for name, value in os.environ.items() if name not in dropped}


IMPORTS = """
import importlib, pkgutil, sys

import torch
import adaconvert.kernels
from adaconvert.kernels import dispatch

for found in pkgutil.iter_modules(adaconvert.kernels.__path__):
    if found.name == "triton_support" or not found.name.startswith("triton_"):
        importlib.import_module(f"adaconvert.kernels.{found.name}")
for op in dispatch.KERNELS:
    assert dispatch.select(op, device="cpu", dtype=torch.float32) is None
    dispatch.why(op, device="cuda", capability=(9, 0), dtype=torch.float32, grad=False)
ours = {name for name in sys.modules if name.startswith("adaconvert.kernels.triton_")}
assert ours == {"adaconvert.kernels.triton_support"}, ours
assert "triton" not in sys.modules
"""
WITHOUT = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else find(name, *more)
import torch
from adaconvert.kernels import dispatch
for op in dispatch.KERNELS:
    assert dispatch.select(op, device="cuda", dtype=torch.float32, capability=(9, 0)) is None
    print(dispatch.why(op, device="cuda", dtype=torch.float32, capability=(9, 0)).split(": ", 1)[1])
"""


# -- the adaptive runtime


def small() -> tuple[torch.Tensor, ExpertWeights, torch.Tensor]:
    up, down = torch.randn(8, 4), torch.randn(4, 8)
    weights = ExpertWeights(None, up, down, None, None, None, functional.relu, 2)
    mask = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    return torch.randn(3, 4), weights, mask


def test_the_runtime_asks_for_a_kernel_off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, mask = small()
    asked: list[dict[str, Any]] = []

    def select(op: str, **facts: Any) -> Any:
        asked.append({"op": op, **facts})
        return lambda x, mask, **options: expert_ffn(
            x.new_ones(3, 4, device="cpu"), mask, **options
        )

    monkeypatch.setattr(dispatch, "select", select)
    out, pairs = run_experts(x.to("meta"), weights, mask)
    plain, _ = run_experts(torch.ones(3, 4), weights, mask, path="dense")
    assert torch.equal(out, plain)
    assert pairs == 12
    (facts,) = asked
    assert facts["op"] == "expert_ffn"
    known = ("device", "tokens", "neurons", "experts", "width", "glu", "selected", "activation")
    told = ("meta", 3, 8, 4, 2, False, None, functional.relu)
    assert tuple(facts[name] for name in known) == told


def test_the_runtime_does_not_count_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, mask = small()
    monkeypatch.setattr(dispatch, "select", lambda op, **facts: lambda *args, **options: x)
    # what is on the meta device cannot be counted
    _, pairs = run_experts(x.to("meta"), weights, mask.to("meta"), selected=2)
    assert pairs == 3 * 2 * 2


def test_a_runtime_that_tells_less_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints hold a copy of the runtime; the first told neither activation nor selected."""
    monkeypatch.setattr(triton_support, "available", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    told = {
        **{"device": "cuda", "dtype": torch.bfloat16, "tokens": 1, "hidden": 64, "neurons": 128},
        **{"experts": 4, "width": 32, "shared": 0, "glu": True, "grad": False},
    }
    assert dispatch.select("expert_ffn", **told) is None
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.select("expert_ffn", **told) is not None


def test_kernels_of_another_interface_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "API_VERSION", adaptive_execution.KERNELS_API + 1)
    monkeypatch.setattr(dispatch, "select", lambda *a, **k: pytest.fail("asked"))
    x, weights, mask = small()
    on_meta = ExpertWeights(
        *(None, weights.up.to("meta"), weights.down.to("meta"), None, None, None),
        *(functional.relu, 2),
    )
    out, pairs = run_experts(x.to("meta"), on_meta, mask.to("meta"))
    assert out.shape == (3, 4)
    assert pairs == 24
