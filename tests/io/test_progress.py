"""progress: a bar for people, silence for everything else."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from adaconvert import progress
from adaconvert.progress import Silent, bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return not super().isatty()


@pytest.mark.parametrize("enabled", [True, False])
def test_silent_when_nobody_watches(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    stream = io.StringIO() if enabled else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with bar(100, "writing", enabled=enabled) as shown:
        assert isinstance(shown, Silent)
        shown.update(50)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("broken", [None, "closed"])
def test_silent_without_a_stream(monkeypatch: pytest.MonkeyPatch, broken: str | None) -> None:
    stream = None if broken is None else Terminal()
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    assert isinstance(bar(1, "writing"), Silent)


def test_bytes_have_units(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with bar(2_500_000, "writing") as shown:
        shown.update(2_500_000)
        shown.update(0)
    assert "writing: " in stream.getvalue()
    assert "B of 2.50MB" in stream.getvalue()
    assert stream.getvalue().isascii()


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with bar(10, "writing") as shown:
        shown.update(10)
    assert "writing" not in stream.getvalue()


@pytest.mark.parametrize(
    "module", ["progress", "io.commit", "io.writer", "io.digest", "io.manifest", "io.aux_files"]
)
def test_imports_stay_light(module: str) -> None:
    code = (
        f"import sys, adaconvert.{module}\n"
        "heavy = {'torch', 'numpy', 'tqdm', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(','.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
