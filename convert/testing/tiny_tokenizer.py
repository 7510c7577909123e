"""A small real byte-level BPE tokenizer, trained in-process in a few milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 300

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    "The converter reads a folder and writes a folder.",
    "Every tensor of the source is used or dropped with a reason, and every one is produced once.",
    "An expert is one feed-forward network among several; the router decides which a token visits.",
    "Die Gewichte bleiben gleich, nur die Ordnung der Dateien nicht. Et tout le reste est perdu.",
    "def route(token, experts):\n    return sorted(experts, key=lambda e: e.score(token))[:2]\n",
)


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    The files are written by hand in the spelling every transformers version reads.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _config())
    _write(folder / "special_tokens_map.json", _roles())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _roles() -> dict[str, object]:
    return {
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        # what Qwen2Tokenizer, which some model types force, takes for granted
        "unk_token": SPECIAL_TOKENS[0],
    }


def _config() -> dict[str, object]:
    decoder = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    }
    return {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [SPECIAL_TOKENS[1]],
        **_roles(),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
