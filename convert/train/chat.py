"""Conversations as token ids, and which of them the assistant said.

A chat template that marks its answers with `{% generation %}` is taken at its word. Of any other
one, each answer is found by rendering the conversation up to it and through it: what the second
text has beyond the first is the answer. A template that renders earlier turns differently once
later ones follow (as those that drop reasoning do) is then asked where the answer ends by changing
its content. What cannot be found that way is refused; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from adaconvert.data.messages import ASSISTANT, Message
from adaconvert.errors import DataError
from adaconvert.io.names import escape

_MARKED: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Llama 3's template writes today's date unless it is given this one, its own default; the same
#: text must come out tomorrow.
_FIXED: Final = {"date_string": "26 Jul 2024"}
#: what content is replaced by: one character it does not have, so that no common end crosses it.
_STAND_INS: Final = "ZQX0123456789" + "".join(map(chr, range(0xE000, 0xE040)))

Span = tuple[int, int]


class Chat:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of transformers.
        label: name of the checkpoint, for messages.

    Raises:
        DataError: it has no chat template, or cannot say which characters a token stands for.
    """

    def __init__(self, tokenizer: Any, label: str) -> None:
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise DataError(
                "the tokenizer of the checkpoint has no chat template",
                where=escape(label),
                hint="Add the chat_template.jinja of a model that has one, or give plain text "
                "(--data-format text).",
            )
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "the tokenizer of the checkpoint has no tokenizer.json, so answers cannot be found",
                where=escape(label),
            )
        self._tokenizer = tokenizer
        self._label = label
        text = template if isinstance(template, str) else str(template.get("default", ""))
        self._marked = _MARKED.search(text) is not None
        self.dated = "strftime_now" in text and "date_string" not in text
        special = sorted(map(str, tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = tuple(token for token in special if token)

    def encode(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and which of them are the assistant's.

        Args:
            messages: as `data.messages.messages_of` returns them.
            where: name of the row, for messages.

        Raises:
            DataError: the template refuses it, or the answers cannot be told from the rest.
        """
        if self._marked:
            return self._encode_marked(messages, where)
        text, spans = self._answers(messages, where)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = [int(token) for token in encoded["input_ids"]]
        offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
        return ids, [any(_within(offset, span) for span in spans) for offset in offsets]

    def _encode_marked(
        self, messages: Sequence[Message], where: str
    ) -> tuple[list[int], list[bool]]:
        try:
            found = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **_FIXED,
            )
        except Exception as error:
            raise self._refused(error, where) from error
        return [int(i) for i in found["input_ids"]], [bool(x) for x in found["assistant_masks"]]

    def _render(self, messages: Sequence[Message], where: str, *, ask: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=ask,
                    **_FIXED,
                )
            )
        # a template is a program: it raises what it likes, and jinja what that leads to
        except Exception as error:
            raise self._refused(error, where) from error

    def _refused(self, error: Exception, where: str) -> DataError:
        return DataError(
            "the chat template refuses the conversation",
            where=where,
            found=f"'{escape(str(error) or type(error).__name__)}'",
        )

    # -- where the answers are

    def _answers(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the characters of each answer."""
        text = self._render(messages, where)
        spans = []
        for at, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            start = self._start(text, messages, at, where)
            through = self._render(messages[: at + 1], where)
            stable = text.startswith(through)
            end = len(through) if stable else self._end(text, through, messages, at, where)
            if start >= end:
                raise self._unstable(where, at)
            spans.append((start, self._stop(text, start, end)))
        return text, spans

    def _start(self, text: str, messages: Sequence[Message], at: int, where: str) -> int:
        """Return where the answer begins: after what the model is given to answer to."""
        if at:
            asked = self._render(messages[:at], where, ask=True)
            if text.startswith(asked):
                return len(asked)
        return _first_difference(text, self._changed(messages, at, where))

    def _end(
        self, text: str, through: str, messages: Sequence[Message], at: int, where: str
    ) -> int:
        """Return where the answer ends in `text`, with what closes it in `through`."""
        closing = through[_last_difference(through, self._changed(messages[: at + 1], at, where)) :]
        content = _last_difference(text, self._changed(messages, at, where))
        said = str(messages[at].get("content", "")).strip()
        found = said and text[:content].rstrip().endswith(said[-1])
        if not found or not text.startswith(closing, content):
            raise self._unstable(where, at)
        return content + len(closing)

    def _changed(self, messages: Sequence[Message], at: int, where: str) -> str:
        """Return the conversation with other content in one message."""
        content = str(messages[at].get("content", ""))
        other = next((c for c in _STAND_INS if c not in content), "")
        changed = {**messages[at], "content": other}
        return self._render([*messages[:at], changed, *messages[at + 1 :]], where)

    def _stop(self, text: str, start: int, end: int) -> int:
        """Return the end of an answer without the blanks after the token that ends a turn: when
        that has been said, nobody asks for more."""
        said = text[start:end].rstrip()
        return start + len(said) if said.endswith(self._special) else end

    def _unstable(self, where: str, at: int) -> DataError:
        return DataError(
            f"the answer in message {at + 1} cannot be found in what the chat template of "
            f"{escape(self._label)} makes of the conversation",
            where=where,
            hint="Put {% generation %} and {% endgeneration %} around answers in the template, or "
            "end every conversation with its first answer.",
        )


def _within(offset: Span, span: Span) -> bool:
    """Return whether the characters of a token lie in a span; empty ones at its start do."""
    return span[0] <= offset[0] < span[1] and offset[1] <= span[1]


def _first_difference(text: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(text), len(other)))


def _last_difference(text: str, other: str) -> int:
    """Return where the end begins that two texts have in common."""
    return len(text) - _first_difference(text[::-1], other[::-1])
