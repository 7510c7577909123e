"""Continues prompts with llama.cpp: its converter to GGUF in float32, then its server.

LLAMA_CPP_SOURCE names the folder of llama.cpp's sources, which hold the converter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp
from outcome import (
    LOADED,
    NEW_TOKENS,
    REFUSED,
    TOP_TOKENS,
    Job,
    Outcome,
    Position,
    one_line,
    run,
    until_end,
)

CONTEXT = 512
TIMEOUT_SECONDS = 300


def answer(job: Job) -> Outcome:
    """Convert the model, continue every prompt, and return what came out."""
    gguf = job.out.with_suffix(".gguf")
    problem = _convert(job.model, gguf)
    if problem:
        return Outcome(version=xllamacpp.__version__, status=REFUSED, detail=problem)
    try:
        return _serve(job, gguf)
    finally:
        gguf.unlink(missing_ok=True)


def _convert(model: Path, gguf: Path) -> str:
    converter = Path(os.environ["LLAMA_CPP_SOURCE"]) / "convert_hf_to_gguf.py"
    command = [sys.executable, str(converter), str(model), "--outfile", str(gguf)]
    done = subprocess.run(
        [*command, "--outtype", "f32"], capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr, sep="\n")
    if done.returncode == 0:
        return ""
    gguf.unlink(missing_ok=True)
    return one_line("converter: " + done.stderr.strip().splitlines()[-1])


def _serve(job: Job, gguf: Path) -> Outcome:
    server = xllamacpp.Server(_parameters(gguf))
    answers = [_complete(server, prompt.ids) for prompt in job.prompts.prompts]
    kept = [until_end(answer["tokens"], job.prompts.end) for answer in answers]
    return Outcome(
        version=xllamacpp.__version__,
        status=LOADED,
        continuations=kept,
        likeliest=[
            _positions(ids, answer["completion_probabilities"])
            for ids, answer in zip(kept, answers, strict=True)
        ],
        texts_cut=[
            _post(server, "tokenize", {"content": one.text, "add_special": False})["tokens"]
            for one in job.prompts.texts
        ],
    )


def _parameters(gguf: Path) -> xllamacpp.CommonParams:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_ctx = CONTEXT
    parameters.n_parallel = 1
    # float32 all through: the cache is float16 by default, and flash attention rounds to it
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup = False
    return parameters


def _complete(server: xllamacpp.Server, ids: list[int]) -> dict[str, Any]:
    asked = {
        "prompt": ids,
        "n_predict": NEW_TOKENS,
        "temperature": 0.0,
        "n_probs": TOP_TOKENS,
        "return_tokens": True,
        "cache_prompt": False,
    }
    return _post(server, "completion", asked)


def _post(server: xllamacpp.Server, path: str, content: dict[str, Any]) -> dict[str, Any]:
    # the binding's own calls return no token ids; the server it starts on a loopback address does
    request = urllib.request.Request(
        f"{server.listening_address}/{path}",
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        return json.load(answer)


def _positions(ids: list[int], entries: list[dict[str, Any]]) -> list[Position]:
    # the server leaves out the entries of tokens that end in the middle of a character
    positions: list[Position] = []
    waiting = iter(entries)
    entry = next(waiting, None)
    for token in ids:
        if entry is not None and entry["id"] == token:
            positions.append({top["id"]: top["logprob"] for top in entry["top_logprobs"]})
            entry = next(waiting, None)
        else:
            positions.append({})
    return positions


if __name__ == "__main__":
    run("llama.cpp", xllamacpp.__version__, answer)
