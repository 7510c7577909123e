"""Conversations: rows whose field holds a list of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from adaconvert.data.rows import Row
from adaconvert.errors import DataError
from adaconvert.io.names import escape, listing
from adaconvert.io.strict_json import type_name

MESSAGES_FIELD: Final = "messages"
#: what a turn may be; the chat template may know fewer.
ROLES: Final = ("system", "developer", "user", "assistant", "tool")
ASSISTANT: Final = "assistant"
_SHAPE = "A conversation is a list of objects such as {'role': 'user', 'content': 'Hello'}."

Message = Mapping[str, Any]


def messages_of(row: Row, field: str = MESSAGES_FIELD) -> list[Message]:
    """Return the conversation a row holds in its first value; keys that hold null are left out.

    Raises:
        DataError: it is no list of messages, a role is unknown, or content is no text.
    """
    value = row.values[0]
    where = f"{row.name} field '{escape(field, 60)}'"
    if not isinstance(value, list):
        raise DataError(
            "is not a conversation",
            where=where,
            expected="a list of messages",
            found=type_name(value),
            hint=_SHAPE,
        )
    return [_message(item, f"{where} message {at}") for at, item in enumerate(value, 1)]


def answers(messages: list[Message]) -> bool:
    """Return whether the assistant says or calls anything."""
    return any(
        message["role"] == ASSISTANT
        and (message.get("content", "").strip() or message.get("tool_calls"))
        for message in messages
    )


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError("is not a message", where=where, found=type_name(value), hint=_SHAPE)
    message = {str(key): item for key, item in value.items() if item is not None}
    _check_role(message, where)
    content = message.get("content")
    if content is None and message["role"] == ASSISTANT and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(
            "has content that is not text",
            where=where,
            expected="a string",
            found=type_name(content),
            hint="Images and other parts cannot be trained on.",
        )
    _check_text(message, where)
    return message


def _check_role(message: Message, where: str) -> None:
    if "role" not in message:
        names = listing([f"'{escape(name, 60)}'" for name in message], 12) or "nothing"
        raise DataError("has no role", where=where, found=names, hint=_SHAPE)
    role = message["role"]
    if role not in ROLES:
        found = f"'{escape(role, 40)}'" if isinstance(role, str) else type_name(role)
        raise DataError(
            "has an unknown role", where=where, expected=f"one of {', '.join(ROLES)}", found=found
        )


def _check_text(message: Message, where: str) -> None:
    """Refuse text that no UTF-8 file can hold, anywhere in a message."""
    try:
        json.dumps(message, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{escape(str(error.object)[error.start])}"
        raise DataError("holds half a surrogate pair", where=where, found=found) from None
    except (ValueError, RecursionError):
        raise DataError("is nested too deeply", where=where) from None
