"""Compiles every kernel for sm_80 and sm_90 without a GPU; what each needs is in a golden file.

One process per file of cases (tests/kernels/compiled): TRITON_INTERPRET must not be set in it.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "compiled"
FILES = sorted(FOLDER.glob("*_cases.py"))
GOLDEN = ROOT / "tests" / "golden" / "kernel_registers.json"
HELD = ("registers", "shared")
LIMIT = 280


@pytest.fixture(scope="module", autouse=True)
def _triton() -> None:
    """Triton is installed; scripts/check.sh wants it, elsewhere it may be missing."""
    if find_spec("triton") is None:
        if os.environ.get("ADACONVERT_REQUIRE_TRITON"):
            pytest.fail("ADACONVERT_REQUIRE_TRITON is set and triton is not installed")
        pytest.skip("triton is not installed: pip install 'adaconvert[triton]'")


def compile_cases(path: Path, folder: Path) -> tuple[int, str, dict[str, Any]]:
    """Run run.py on one file; return its exit code, what it printed and its report."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--json", str(folder / "report.json"), str(path)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    report = folder / "report.json"
    cases = json.loads(report.read_text())["cases"] if report.exists() else {}
    return done.returncode, done.stdout, cases


def held(cases: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a report that the golden file holds."""
    return {
        name: {gpu: {key: row[key] for key in HELD} for gpu, row in rows.items()}
        for name, rows in sorted(cases.items())
    }


def write_golden(part: str, cases: dict[str, Any]) -> None:
    """Put the cases of one file into the golden file; other processes may do so too."""
    with GOLDEN.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        old = json.loads(file.read() or "{}")
        current = {path.stem for path in FILES}
        parts = {name: old[name] for name in current & set(old)} | {part: cases}
        file.truncate(0)
        golden = {"triton": version("triton"), **dict(sorted(parts.items()))}
        file.write(json.dumps(golden, indent=1) + "\n")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kernels_compile_for_gpus(path: Path, tmp_path: Path, update_golden: bool) -> None:
    code, printed, cases = compile_cases(path, tmp_path)
    sys.stdout.write(printed)
    assert code == 0, printed
    if update_golden:
        write_golden(path.stem, held(cases))
    golden = json.loads(GOLDEN.read_text())
    if golden["triton"] == version("triton"):
        assert held(cases) == golden[path.stem], "--update-golden accepts it"


def test_the_golden_file_is_of_the_pinned_version_and_of_every_file() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert f"triton=={golden.pop('triton')}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert sorted(golden) == [path.stem for path in FILES]


EXAMPLE = """
import torch
import triton
import triton.language as tl
from case import Case


@triton.jit
def gather(
    x, index, y, rows, stride, narrow, WIDTH: tl.constexpr, FEW: tl.constexpr, N: tl.constexpr
):
    at = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.load(index + at, mask=at < rows, other=0).to(tl.int64)
    column = tl.arange(0, 64)
    value = tl.load(x + row[:, None] * stride + column, mask=(at < rows)[:, None], other=0.0)
    out = y + (at * narrow + at * FEW)[:, None] + at.to(tl.int64)[:, None] * WIDTH + column
    tl.store(out, value, mask=(at < rows)[:, None])


@triton.jit
def total(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


@triton.jit
def outer(x, y, z, N: tl.constexpr, K: tl.constexpr):
    n, k = tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + n[:, None] * K + k)
    b = tl.load(y + k[:, None] * N + n)
    tl.store(z + n[:, None] * N + n, tl.dot(a, b))


x, index = torch.zeros(100, 64), torch.zeros(100, dtype=torch.int32)
rows = dict(kernel=gather, arguments=(x, index, x, 100, 64, 7))
small = dict(WIDTH=999, FEW=77, N=32)
"""
GOOD = "CASES = [Case(name='good', **rows, constants=small, wide=('stride', 'WIDTH'))]\n"


EMPTY = "Case(name='a', kernel=None, arguments=(), constants={}, targets=())"


def example(folder: Path, text: str) -> tuple[int, str, dict[str, Any]]:
    """Run the harness on the kernels above and the cases in `text`."""
    path = folder / "example_cases.py"
    path.write_text(EXAMPLE + text)
    return compile_cases(path, folder)


def test_a_good_case_passes(tmp_path: Path) -> None:
    code, printed, cases = example(tmp_path, GOOD)
    assert code == 0, printed
    assert set(cases["good"]) == {"sm80", "sm90"}
    for row in cases["good"].values():
        assert row["registers"] > 8
        assert row["spills"] == row["stack"] == 0
        assert row["instructions"]["LDG"]


BAD = {
    "missing instruction": (
        "Case(name='bad', **rows, constants=small, wants={90: ('HGMMA',)})",
        "sm90: FAILED: no HGMMA",
    ),
    "spilling": (
        "Case(name='bad', **rows, constants=dict(small, N=64, maxnreg=32), warps=1)",
        "sm80: FAILED: spills: ",
    ),
    "shared memory": (
        "Case(name='bad', kernel=outer, arguments=(x, x, x), warps=8,"
        " constants=dict(N=128, K=256))",
        "shared memory: ",
    ),
    "float atomics": (
        "Case(name='bad', kernel=total, arguments=(x, x), constants=dict(BLOCK=64))",
        "adds floats in the order of arrival: ",
    ),
    "narrow stride": (
        "Case(name='bad', **rows, constants=small, wide=('narrow',))",
        "narrow: a product in 32 bits",
    ),
    "narrow constant": (
        "Case(name='bad', **rows, constants=small, wide=('FEW',))",
        "FEW: a product in 32 bits",
    ),
    "no such number": (
        "Case(name='bad', **rows, constants=small, wide=('pitch',))",
        "pitch: the compiled kernel has no such number",
    ),
    "never a product": (
        "Case(name='bad', **rows, constants=small, wide=('rows',))",
        "rows: never multiplied in 64 bits",
    ),
    "refused": ("Case(name='bad', **rows, constants=dict(small, N=33))", "FAILED: Compil"),
}


def test_every_bad_case_fails(tmp_path: Path) -> None:
    cases = [case.replace("'bad'", repr(f"bad {kind}")) for kind, (case, _) in BAD.items()]
    code, printed, _ = example(tmp_path, f"CASES = [{', '.join(cases)}]\n")
    assert code == 1
    for kind, (_, message) in BAD.items():
        lines = [line for line in printed.splitlines() if line.startswith(f"bad {kind} ")]
        assert any(message in line for line in lines), printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CASES = []\n", "CASES is empty"),
        (f"from case import Case\nCASES = 2 * [{EMPTY}]\n", "two cases have one name"),
        (f"from case import Case\nCASES = [{EMPTY}]\n", "a case is for no GPU"),
    ],
    ids=["no case", "one name", "no GPU"],
)
def test_a_file_that_proves_nothing_fails(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "example_cases.py"
    path.write_text(text)
    code, printed, cases = compile_cases(path, tmp_path)
    assert code == 1
    assert message in printed
    assert cases == {}


def test_it_does_not_run_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(FOLDER / "run.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "nothing would be compiled" in done.stderr
