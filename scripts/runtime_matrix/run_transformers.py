"""Continues prompts with stock transformers, 4.57 or 5, in float32, by the plainest greedy loop.

The logits over the prompts themselves are kept beside the outcome (`.npz`), for comparison in full.
"""

from __future__ import annotations

import numpy as np
import torch
import transformers
from outcome import LOADED, NEW_TOKENS, TOP_TOKENS, Job, Outcome, Position, one_line, run, until_end
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(job: Job) -> Outcome:
    """Load the model, continue every prompt, and return what came out."""
    model, problems = load(job)
    continuations: list[list[int]] = []
    likeliest: list[list[Position]] = []
    logits: list[np.ndarray] = []
    for prompt in job.prompts.prompts:
        ids, positions, of_prompt = _continue(model, prompt.ids)
        kept = until_end(ids, job.prompts.end)
        continuations.append(kept)
        likeliest.append(positions[: len(kept)])
        logits.append(of_prompt)
    np.savez(job.out.with_suffix(".npz"), *logits)
    cut, why = _cut_texts(job)
    return Outcome(
        version=transformers.__version__,
        status=LOADED,
        detail=problems,
        continuations=continuations,
        likeliest=likeliest,
        texts_cut=cut,
        tokenizer_detail=why,
    )


def load(job: Job) -> tuple[torch.nn.Module, str]:
    """Return the model in float32 and what the loader had to say about keys, "" when nothing."""
    model, report = AutoModelForCausalLM.from_pretrained(
        job.model, torch_dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    counts = {kind: len(report[kind]) for kind in kinds}
    return model.eval(), ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)


@torch.no_grad()
def _continue(
    model: torch.nn.Module, ids: list[int]
) -> tuple[list[int], list[Position], np.ndarray]:
    output = model(input_ids=torch.tensor([ids]), use_cache=True)
    of_prompt = output.logits[0].float().numpy()
    new: list[int] = []
    positions: list[Position] = []
    for _ in range(NEW_TOKENS):
        values, tokens = output.logits[0, -1].float().log_softmax(-1).topk(TOP_TOKENS)
        positions.append(dict(zip(tokens.tolist(), values.tolist(), strict=True)))
        new.append(int(tokens[0]))
        output = model(
            input_ids=torch.tensor([new[-1:]]),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return new, positions, of_prompt


def _cut_texts(job: Job) -> tuple[list[list[int]] | None, str]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
    # a tokenizer that does not load says nothing about the weights
    except Exception as error:
        return None, one_line(error)
    cut = [tokenizer.encode(one.text, add_special_tokens=False) for one in job.prompts.texts]
    return cut, ""


if __name__ == "__main__":
    run("transformers", transformers.__version__, answer)
