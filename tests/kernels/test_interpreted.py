"""Runs each file of tests/kernels/interpreted in a process of its own, with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))
LIMIT = 280


@pytest.fixture(scope="module", autouse=True)
def _triton() -> None:
    """Triton is installed; scripts/check.sh wants it, elsewhere it may be missing."""
    if find_spec("triton") is None:
        if os.environ.get("ADACONVERT_REQUIRE_TRITON"):
            pytest.fail("ADACONVERT_REQUIRE_TRITON is set and triton is not installed")
        pytest.skip("triton is not installed: pip install 'adaconvert[triton]'")


def child_environment() -> dict[str, str]:
    """Return this environment without what pytest left in it, set for the interpreter."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**kept, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def run(path: Path) -> str:
    """Run the tests of one file in a fresh process; return what it printed.

    Raises:
        AssertionError: a test failed, or none passed.
    """
    command = [sys.executable, "-P", "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(path)],
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    passed = re.search(r"\b\d+ passed\b", done.stdout)
    assert done.returncode == 0, f"{path.name}: exit {done.returncode}\n{done.stdout}"
    assert passed, f"{path.name}: no test passed\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kernels_in_the_interpreter(path: Path) -> None:
    sys.stdout.write(run(path))


def test_there_are_files() -> None:
    assert FILES


EXAMPLE = """
import torch
import triton
import triton.language as tl


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr, HOLE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n, other=0.0), mask=at < n - HOLE)


def launch(x, hole):
    y = torch.empty_like(x)
    double[(triton.cdiv(x.numel(), 4),)](x, y, x.numel(), BLOCK=4, HOLE=hole)
    return y


def test_all_written(poison):
    x = torch.randn(13)
    assert torch.equal(launch(x, HOLE), 2 * x)


def test_integers(poison):
    assert torch.empty(4, dtype=torch.int8).tolist() == [-128, 127, -128, 127]
    assert torch.ones(2).new_empty(3).isnan().all()
"""


def example(folder: Path, text: str) -> Path:
    """Write a file of tests next to a copy of the conftest that the real ones have."""
    (folder / "conftest.py").write_text((FOLDER / "conftest.py").read_text())
    path = folder / "test_example.py"
    path.write_text(text)
    return path


def test_a_kernel_that_writes_everything_passes(tmp_path: Path) -> None:
    assert "2 passed" in run(example(tmp_path, EXAMPLE.replace("HOLE)", "0)")))


def test_an_output_left_unwritten_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"nan[\s\S]*1 failed, 1 passed"):
        run(example(tmp_path, EXAMPLE.replace("HOLE)", "1)")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "exit 5"),
        ("import pytest\n\ndef test_none():\n    pytest.skip('later')\n", "no test passed"),
        ("import os\n\ndef test_crash():\n    os.abort()\n", "exit -6"),
    ],
    ids=["no test", "all skipped", "crash"],
)
def test_a_process_that_proves_nothing_fails(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run(example(tmp_path, text))


def test_nothing_is_collected_without_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--collect-only", str(FOLDER)]
    environment = {**child_environment(), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 5, done.stdout


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_only_the_triton_modules_import_triton(interpret: str) -> None:
    names = sorted(path.stem for path in (ROOT / "kernels" / "ops").glob("*.py"))
    own = [name for name in names if not name.startswith(("__", "triton_"))]
    assert "dispatch" in own
    # torch's compiler imports Triton by itself where it is installed; what it found, it keeps
    code = (
        "import importlib, sys, torch._dynamo\n"
        "for name in list(sys.modules):\n"
        "    if name.partition('.')[0] == 'triton': sys.modules[name] = None\n"
        "sys.modules['triton'] = None\n"
        f"for name in {[*own, 'triton_support']!r}:\n"
        "    importlib.import_module('adaconvert.kernels.' + name)\n"
    )
    environment = {**child_environment(), "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
