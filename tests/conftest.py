"""What holds for every test: one thread, no network, no user's cache, no user's token."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# set before anything imports torch, numpy or huggingface_hub, which read them once.
# spinning OpenMP threads make a busy machine ten times slower, so one thread each.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
os.environ.update(_ENVIRONMENT)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
    os.environ.pop(_name, None)

_LOCAL = ("localhost", "127.", "::1", "0.0.0.0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files in tests/golden"
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # a shell that started this in the background; tests send it, and children inherit
        signal.signal(signal.SIGINT, signal.default_int_handler)
    home = tempfile.mkdtemp(prefix="adaconvert-hf-home-")
    os.environ["HF_HOME"] = home
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection that would leave this machine raises."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
    getaddrinfo = socket.getaddrinfo

    def check(host: object) -> None:
        if isinstance(host, str) and not host.startswith(_LOCAL):
            raise RuntimeError(f"a test tried to reach the network: {host}")

    def guarded_connect(self: socket.socket, address: object) -> None:
        check(address[0] if isinstance(address, tuple) else None)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: object) -> int:
        check(address[0] if isinstance(address, tuple) else None)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: object, *args: object, **kwargs: object) -> object:
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    """True when the golden files are to be rewritten instead of compared."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct as scripts/smollm2.py writes it; read only."""
    default = ROOT / ".models" / "SmolLM2-135M-Instruct"
    folder = Path(os.environ.get("ADACONVERT_SMOLLM2", default))
    if (folder / "config.json").is_file():
        return folder
    if os.environ.get("ADACONVERT_REQUIRE_REAL"):
        pytest.fail(f"ADACONVERT_REQUIRE_REAL is set and {folder} holds no model")
    pytest.skip("SmolLM2-135M-Instruct is not here: scripts/smollm2.py fetches it")
