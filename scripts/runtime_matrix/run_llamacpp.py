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

import xllamacpp
from outcome import LOADED, NEW_TOKENS, REFUSED, TOP_TOKENS, Job, Outcome, Position, one_line, run

CONTEXT = 512
TIMEOUT_SECONDS = 30


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
    return Outcome(
        version=xllamacpp.__version__,
        status=LOADED,
        continuations=[[entry["id"] for entry in found] for found in answers],
        likeliest=[[_position(entry) for entry in found] for found in answers],
        texts_cut=[_cut(server, text) for text in job.prompts.texts],
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


def _complete(server: xllamacpp.Server, ids: list[int]) -> list[dict]:
    found = server.handle_completions(
        {
            "prompt": ids,
            "max_tokens": NEW_TOKENS,
            "temperature": 0.0,
            "n_probs": TOP_TOKENS,
            "logprobs": TOP_TOKENS,
            "cache_prompt": False,
        }
    )
    return found["choices"][0]["logprobs"]["content"]


def _cut(server: xllamacpp.Server, text: str) -> list[int]:
    # the binding has no call for it, but the server it starts on the loopback address does
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        return json.load(answer)["tokens"]


def _position(entry: dict) -> Position:
    return {top["id"]: top["logprob"] for top in entry["top_logprobs"]}


if __name__ == "__main__":
    run("llama.cpp", xllamacpp.__version__, answer)
