"""Group K of the fault catalogue: what the machine, the shell and other packages can do to a run.

K2 (kernel compilation) comes with the kernels.
"""

from __future__ import annotations

import hashlib
import os
import pty
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adaconvert.testing import faults, tiny_models

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--experts", "4", "--top-k", "2")


def adaconvert(
    *arguments: object, python: Sequence[str] = (), **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command in another process."""
    command = [sys.executable, *python, "-m", "adaconvert", *map(str, arguments)]
    kwargs = {"capture_output": True, "text": True, "timeout": 240, **kwargs}
    return subprocess.run(command, **kwargs)


def environment(**changes: str | None) -> dict[str, str]:
    """Return this environment with changes; None removes."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def upcycle(source: Path, target: Path, *options: object, **kwargs: Any) -> str:
    """Convert, expect success without a word on stderr, and return stdout."""
    done = adaconvert("upcycle", source, target, *SMALL, *options, **kwargs)
    assert (done.returncode, done.stderr) == (0, "")
    assert (target / "adaconvert.json").is_file()
    return done.stdout


def tree(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real Llama with a tokenizer."""
    return tiny_models.make("llama", tmp_path_factory.mktemp("k") / "dense")


@pytest.fixture
def crafted(tmp_path: Path) -> Path:
    """A smaller one still, in three files, made without torch."""
    return faults.write_sharded(tmp_path / "crafted")


# K1: no triton, no GPU


def test_k1_no_triton_and_no_gpu(model: Path, tmp_path: Path) -> None:
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "triton.py").write_text("raise ImportError('No module named triton')\n")
    env = environment(CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(tmp_path / "absent"))
    assert "wrote" in upcycle(model, tmp_path / "out", env=env)


# K3: a package below its floor


def fake_distribution(folder: Path, name: str, version: str) -> str:
    """Write metadata that stands before the installed one, and return the path to add."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("package", "found", "needed"),
    [("torch", "2.9.1", "2.11"), ("transformers", "5.3.0", "5.17"), ("safetensors", "0.7", "0.8")],
)
@pytest.mark.parametrize("verb", ["upcycle", "verify"])
def test_k3_package_too_old(
    crafted: Path, tmp_path: Path, package: str, found: str, needed: str, verb: str
) -> None:
    env = environment(PYTHONPATH=fake_distribution(tmp_path / "site", package, found))
    done = adaconvert(verb, crafted, tmp_path / "out", env=env)
    assert (done.returncode, done.stdout) == (6, "")
    start = f"error: package {package}: too old: "
    assert done.stderr.startswith(start)
    end = f"; expected >= {needed}, found {found}. Run: pip install '{package}>={needed}'\n"
    assert done.stderr.endswith(end)
    assert not (tmp_path / "out").exists()


def test_k3_reading_needs_no_torch(crafted: Path, tmp_path: Path) -> None:
    env = environment(PYTHONPATH=fake_distribution(tmp_path / "site", "torch", "2.5.0"))
    assert adaconvert("inspect", crafted, env=env).returncode == 0
    assert adaconvert("plan", "upcycle", crafted, env=env).returncode == 0


# K4: asserts removed


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["abce", "d"])
def test_k4_every_refusal_survives_optimisation(groups: str, tmp_path: Path) -> None:
    files = sorted(str(path) for path in Path(__file__).parent.glob(f"test_[{groups}]_*.py"))
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-x", "-rp", "-p", "no:cacheprovider"]
    # pytest keeps the asserts of test modules alive; children inherit the environment variable
    done = subprocess.run(
        [*command, "-m", "not slow", "--basetemp", str(tmp_path / "pytest"), *files],
        env=environment(PYTHONOPTIMIZE="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for group in groups:
        assert f"PASSED tests/faults/test_{group}_" in done.stdout


def test_k4_options_are_refused_under_optimisation(crafted: Path, tmp_path: Path) -> None:
    done = adaconvert("plan", "upcycle", crafted, "--top-k", "9", python=["-O"])
    assert done.returncode == 2
    assert "--top-k: more experts per token than there are experts" in done.stderr


# K5: no UTF-8


def test_k5_locale_without_utf8(model: Path, tmp_path: Path) -> None:
    env = environment(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert upcycle(model, tmp_path / "out", env=env).isascii()
    upcycle(model, tmp_path / "plain")
    assert tree(tmp_path / "plain") == tree(tmp_path / "out")


def test_k5_names_outside_ascii(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "mod\u00e8le"
    shutil.copytree(model, source)
    out = upcycle(source, tmp_path / "sortie-\u00e9", env=environment(LC_ALL="C"))
    assert "wrote" in out
    strict = environment(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    done = adaconvert("inspect", tmp_path / "abs\u00ebnt", env=strict)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.isascii()
    assert "Traceback" not in done.stderr


# K6: stdout closed, not a terminal, narrow


@pytest.mark.parametrize("verb", [("inspect",), ("plan", "upcycle"), ("inspect", "--json")])
def test_k6_reader_has_gone(crafted: Path, verb: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "adaconvert", *verb, str(crafted)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_k6_help_into_a_closed_pipe() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "adaconvert", "upcycle", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_k6_streams_closed_from_the_start(crafted: Path, closed: str) -> None:
    script = f'exec "{sys.executable}" -m adaconvert inspect "{crafted}" {closed}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_k6_error_with_stderr_closed_goes_nowhere_else(tmp_path: Path) -> None:
    script = f'exec "{sys.executable}" -m adaconvert inspect "{tmp_path}/absent" 2>&-'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_k6_no_bars_and_no_colour_without_a_terminal(model: Path, tmp_path: Path) -> None:
    env = environment(COLUMNS="20", NO_COLOR="1", TERM="dumb")
    out = upcycle(model, tmp_path / "out", env=env)
    assert "\r" not in out
    assert "\x1b" not in out


def test_k6_narrow_terminal(crafted: Path) -> None:
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "adaconvert", "plan", "upcycle", str(crafted)],
        stdout=follower,
        stderr=follower,
        env=environment(COLUMNS="20"),
        timeout=60,
    )
    os.close(follower)
    shown = os.read(leader, 1 << 16)
    os.close(leader)
    assert done.returncode == 0
    assert b"Traceback" not in shown


# K7: few open files, little memory


def limit(kind: int, value: int) -> Any:
    """Return what sets a limit in the child."""
    return lambda: resource.setrlimit(kind, (value, value))


def test_k7_thirty_two_open_files(tmp_path: Path) -> None:
    source = faults.write_sharded(tmp_path / "source", shards=20)
    few = limit(resource.RLIMIT_NOFILE, 32)
    upcycle(source, tmp_path / "out", "--no-verify", "--max-shard-size", "1KB", preexec_fn=few)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5


def big_llama(folder: Path, layers: int = 4, hidden: int = 1024, inner: int = 8192) -> Path:
    """Write a checkpoint of zeros, its data one hole in the file."""
    folder.mkdir()
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    faults.write_config(folder, **sizes)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    wide = {"hidden": hidden, "inner": inner}
    for name, (_, shape, _) in faults.dense_tensors(layers).items():
        real = [{8: wide["hidden"], 12: wide["inner"], 16: 16}[size] for size in shape]
        start, end = end, end + 4 * real[0] * (real[1] if len(real) > 1 else 1)
        header[name] = faults.entry("F32", real, start, end)
    raw = faults.craft(header)
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    os.truncate(path, len(raw) + end)
    assert struct.unpack("<Q", raw[:8])[0] == len(raw) - 8
    return folder


@pytest.mark.slow
def test_k7_a_model_larger_than_the_memory_allowed(tmp_path: Path) -> None:
    source = big_llama(tmp_path / "source")
    size = (source / "model.safetensors").stat().st_size
    allowed = 384 << 20
    assert size > allowed
    done = adaconvert(
        *("upcycle", source, tmp_path / "out", "--experts", 2, "--top-k", 2, "--no-verify"),
        preexec_fn=limit(resource.RLIMIT_AS, allowed),
    )
    assert (done.returncode, done.stderr) == (0, "")
    shutil.rmtree(tmp_path / "out")


# K8: no HOME, another user


def test_k8_home_unset(model: Path, tmp_path: Path) -> None:
    unset = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME", "USER", "LOGNAME"))
    upcycle(model, tmp_path / "out", env=environment(**unset, PATH="/usr/bin:/bin"))


AS_NOBODY = """
import os, sys
import functools, importlib.metadata
importlib.metadata.version = functools.cache(importlib.metadata.version)
from adaconvert.cli.main import run
source, warm, free, closed = sys.argv[1:]
rest = ["--experts", "4", "--no-verify", "-q"]
# the interpreter may lie where the other user cannot read: load everything that is needed first
assert run(["upcycle", source, warm, *rest]) == 0
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(run(["upcycle", source, free, *rest]), run(["upcycle", source, closed, *rest]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_k8_another_user() -> None:
    """A user without name or home converts where it may write, and is told where it may not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        source = faults.write_dense(folder / "source")
        closed = folder / "closed"
        closed.mkdir(mode=0o755)
        places = (source, folder / "warm", folder / "free", closed / "out")
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, *map(str, places)],
            env=environment(HOME=None),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout == "0 6\n", done.stderr
        assert "closed" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(closed.iterdir()) == []
        assert (folder / "free" / "adaconvert.json").stat().st_uid == 65534
        assert tree(folder / "free") == tree(folder / "warm")


# K9: the clock


def test_k9_nothing_depends_on_the_time(crafted: Path, tmp_path: Path) -> None:
    upcycle(crafted, tmp_path / "now", "--no-verify")
    for path in crafted.iterdir():
        os.utime(path, (86400.0, 86400.0))
    upcycle(crafted, tmp_path / "then", "--no-verify", env=environment(TZ="Pacific/Kiritimati"))
    assert tree(tmp_path / "now") == tree(tmp_path / "then")


# K10: started in a folder full of traps


def test_k10_current_folder_is_not_searched(model: Path, tmp_path: Path) -> None:
    traps = tmp_path / "traps"
    (traps / "kernels").mkdir(parents=True)
    mark = f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n"
    for name in ("transformers.py", "torch.py", "numpy.py", "click.py", "sitecustomize.py"):
        (traps / name).write_text(mark)
    (traps / "kernels" / "__init__.py").write_text(mark)
    upcycle(model, tmp_path / "out", cwd=traps)
    assert not (tmp_path / "sprung").exists()


def test_k10_in_the_repository_root(model: Path, tmp_path: Path) -> None:
    upcycle(model, tmp_path / "out", cwd=ROOT)


# K11: the Hugging Face package `kernels`


@pytest.mark.parametrize(
    ("version", "content"),
    [
        (None, "raise RuntimeError('broken kernels')\n"),
        (None, ""),
        ("0.1.0", "raise RuntimeError('broken kernels')\n"),
        ("0.18.9", "raise RuntimeError('broken kernels')\n"),
        ("99.0", "raise RuntimeError('broken kernels')\n"),
    ],
    ids=["broken", "empty", "too-old", "accepted-and-broken", "too-new"],
)
def test_k11_hugging_face_kernels(
    model: Path, tmp_path: Path, version: str | None, content: str
) -> None:
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(content)
    if version is not None:
        fake_distribution(site, "kernels", version)
    upcycle(model, tmp_path / "out", env=environment(PYTHONPATH=str(site)))
