"""Continues prompts with vLLM on a CPU, in float32.

VLLM_CPU_KVCACHE_SPACE=1 and VLLM_ENABLE_V1_MULTIPROCESSING=0 are to be set by the caller.
"""

from __future__ import annotations

import gc

import vllm
from outcome import LOADED, NEW_TOKENS, TOP_TOKENS, Job, Outcome, Position, run, until_end
from vllm.distributed import cleanup_dist_env_and_memory

MAX_LENGTH = 256
# no more of the cache than one prompt takes: the machine is small
SEQUENCES = 1


def answer(job: Job) -> Outcome:
    """Load the model, continue every prompt, and return what came out."""
    try:
        return _ask(job)
    finally:
        # several models are asked in one process, one after the other
        gc.collect()
        cleanup_dist_env_and_memory()


def _ask(job: Job) -> Outcome:
    model = vllm.LLM(
        str(job.model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_LENGTH,
        max_num_seqs=SEQUENCES,
        max_logprobs=TOP_TOKENS,
        enable_prefix_caching=False,
        trust_remote_code=False,
        seed=0,
    )
    # its own default would read generation_config.json, which may ask for sampling
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=TOP_TOKENS
    )
    asked = [{"prompt_token_ids": prompt.ids} for prompt in job.prompts.prompts]
    answers = [model.generate([prompt], sampling)[0].outputs[0] for prompt in asked]
    kept = [until_end(list(found.token_ids), job.prompts.end) for found in answers]
    tokenizer = model.get_tokenizer()
    return Outcome(
        version=vllm.__version__,
        status=LOADED,
        continuations=kept,
        likeliest=[
            [_position(entry) for entry in found.logprobs[: len(ids)]]
            for found, ids in zip(answers, kept, strict=True)
        ],
        texts_cut=[
            list(tokenizer.encode(one.text, add_special_tokens=False)) for one in job.prompts.texts
        ],
    )


def _position(entry: dict[int, vllm.logprobs.Logprob]) -> Position:
    return {token: found.logprob for token, found in entry.items()}


if __name__ == "__main__":
    run("vLLM", vllm.__version__, answer)
