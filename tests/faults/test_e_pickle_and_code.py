"""Group E of the fault catalogue: pickles and code. Neither is ever opened.

adaconvert has no switch that opens pickles: rows E2 to E6, which describe one, shrink to the same
refusal, and the tests show that no byte of these files is read.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from adaconvert.errors import SourceError
from adaconvert.io.source import Source
from adaconvert.testing.faults import refusal, write_config, write_dense

RESAVE = (
    "Convert it to safetensors first (for example load it with transformers and save_pretrained)."
)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o755)


class Watch:
    """Collects what is opened below a folder, by whatever means."""

    folder: str | None = None
    names: tuple[str, ...] = ()


def _on_event(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and Watch.folder is not None:
        path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
        if path.startswith(Watch.folder):
            Watch.names += (os.path.basename(path),)


# an audit hook stays for good, so it is made once and switched by Watch.folder
sys.addaudithook(_on_event)


def opened_by(folder: Path) -> tuple[Source, set[str]]:
    """Return the checkpoint in `folder` and the names of all files opened on the way."""
    Watch.folder, Watch.names = str(folder), ()
    try:
        return Source.open(folder), set(Watch.names)
    finally:
        Watch.folder = None


@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model.bin"],
        ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        ["consolidated.00.pth"],
        ["model.pt"],
        ["model.ckpt"],
        ["model.pkl"],
    ],
)
def test_e1_pickles_only(tmp_path: Path, names: list[str]) -> None:
    write_config(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"\x80\x02.")
    assert refusal(tmp_path) == f"{names[0]}: pickled weights are never opened. {RESAVE}"


def test_e1_gguf_only(tmp_path: Path) -> None:
    (tmp_path / "model-q8_0.gguf").write_bytes(b"GGUF")
    message = refusal(tmp_path)
    assert message.startswith("model-q8_0.gguf: GGUF files are not read. Convert it to safetensors")
    assert "gguf_file=name" in message


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "model.onnx"])
def test_e1_other_formats_only(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    assert refusal(tmp_path) == f"{name}: weights in this format are not read. {RESAVE}"


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin", "model.safetensors"])
def test_e1_a_file_instead_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert refusal(tmp_path / name).startswith(f"{name}: is a file; expected a checkpoint folder")


def _pickle_bytes(kind: str, payload: Path) -> bytes:
    """Return a pickle-bearing file of one of the kinds torch.load knows."""
    raw = pickle.dumps({"state_dict": {"w": Payload(payload)}})
    buffer = io.BytesIO()
    if kind == "plain":
        return raw
    if kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            info = tarfile.TarInfo("pickle")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
        return buffer.getvalue()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", raw)
        if kind == "bomb":
            archive.writestr("archive/data/0", bytes(16 << 20))
        if kind == "absolute":
            archive.writestr("/absolute/data.pkl", raw)
        if kind == "torchscript":
            archive.writestr("archive/constants.pkl", raw)
            archive.writestr("archive/code/__torch__.py", "x")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["plain", "zip", "tar", "bomb", "absolute", "torchscript"])
def test_e2_to_e6_no_pickle_is_opened(tmp_path: Path, kind: str) -> None:
    payload = tmp_path / "payload"
    folder = tmp_path / "folder"
    folder.mkdir()
    write_config(folder)
    (folder / "pytorch_model.bin").write_bytes(_pickle_bytes(kind, payload))
    message = f"pytorch_model.bin: pickled weights are never opened. {RESAVE}"
    with pytest.raises(SourceError, match=re.escape(message)):
        opened_by(folder)
    assert not payload.exists()
    assert Watch.names == ()


@pytest.mark.parametrize("kind", ["plain", "zip", "torchscript"])
def test_e2_a_pickle_under_the_name_of_safetensors(tmp_path: Path, kind: str) -> None:
    payload = tmp_path / "payload"
    folder = tmp_path / "folder"
    folder.mkdir()
    write_config(folder)
    (folder / "model.safetensors").write_bytes(_pickle_bytes(kind, payload))
    assert refusal(folder).startswith("model.safetensors: is a ")
    assert not payload.exists()


@pytest.mark.timeout(5)
def test_e7_training_state_is_never_opened(tmp_path: Path) -> None:
    write_dense(tmp_path)
    # opening a FIFO would hang
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        os.mkfifo(tmp_path / name)
    source = Source.open(tmp_path)
    assert source.side_files == ()
    assert "pickled weights" not in " ".join(source.notes)


def test_e7_training_state_is_no_model(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x02.")
    assert "the folder holds no weights" in refusal(tmp_path)


@pytest.mark.parametrize(
    "target", ["modeling_x.X", "org/other--modeling_x.X"], ids=["e8_own", "e9_other_repository"]
)
def test_code_files_are_not_imported(tmp_path: Path, target: str) -> None:
    folder = write_dense(tmp_path / "folder", auto_map={"AutoModelForCausalLM": target})
    payload = tmp_path / "payload"
    for name in ("modeling_x.py", "configuration_x.py", "__init__.py"):
        (folder / name).write_text(f"import os; os.mkdir({str(payload)!r})")
    modules = set(sys.modules)
    source, names = opened_by(folder)
    assert not payload.exists()
    assert not [name for name in set(sys.modules) - modules if name.endswith("_x")]
    assert "auto_map" not in source.config
    assert source.notes == ("config.json: dropped auto_map (could load code)",)
    assert names == {"config.json", "model.safetensors"}


def test_e10_custom_code_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("asked a question")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    source = Source.open(write_dense(tmp_path, model_type="no_such_type", auto_map=auto_map))
    assert source.config["model_type"] == "no_such_type"


def test_e11_e12_templates_and_tokenizers_are_only_listed(tmp_path: Path) -> None:
    write_dense(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'
    )
    source, names = opened_by(tmp_path)
    assert source.side_files == ("chat_template.jinja", "tokenizer_config.json")
    assert names == {"config.json", "model.safetensors"}
