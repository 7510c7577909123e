"""Continue a chat message greedily with stock transformers, in float32.

    python scripts/greedy.py FOLDER MESSAGE [TOKENS]

Imports nothing of adaconvert and runs no code from the checkpoint: what it prints is what any user
of transformers gets. The first line names the class, the rest is the continuation.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main(folder: str, message: str, tokens: int = 40) -> None:
    """The class and the greedy continuation are on stdout."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    assert "adaconvert" not in sys.modules
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"[{type(model).__name__}, {parameters / 1e6:.1f} M parameters]")
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], sys.argv[2], *(int(number) for number in sys.argv[3:]))
