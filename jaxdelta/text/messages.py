"""Chats as data sets write them: lists of messages with role and content, or ShareGPT's from and value."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxdelta.errors import JaxDeltaError, plain_errors

CHATS = ("auto", "off")
KEYS = ("messages", "conversations")  # fields or columns that hold chats
# Fields or columns that belong to the messages: tools, system prompt (ShareGPT), settings of the template.
COMPANIONS = ("tools", "system", "chat_template_kwargs")
ASSISTANT = "assistant"
# The roles of ShareGPT's names.
_SHARED = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The messages of a chat, the tools they may call, and where they were read."""

    messages: tuple[Message, ...]
    where: str
    tools: Any = None


def chat_key(names: Iterable[str], text_key: str, default: str) -> str:
    """The field that holds the text: `text_key`, or a chat's where the default is missing."""
    names = set(names)
    if text_key == default and text_key not in names:
        return next((key for key in KEYS if key in names), text_key)
    return text_key


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(x, Mapping) for x in value)


def conversation(value: Sequence[Any], where: str, row: Mapping[str, Any] | None = None) -> Conversation:
    """The chat in a list of messages, as OpenAI (role, content) or ShareGPT (from, value) write them.

    Raises:
        JaxDeltaError: a message without role or content, or content that is no text; a row's system prompt
            that is not the messages' own; settings of the template.
    """
    row = row or {}
    messages = tuple(_message(item, f"{where}: message {n}") for n, item in enumerate(value, 1))
    if system := row.get("system"):
        messages = _with_system(messages, system, where)
    if row.get("chat_template_kwargs"):
        raise JaxDeltaError(f"{where}: has chat_template_kwargs, which are not applied; remove them")
    tools = row.get("tools") or None
    if isinstance(tools, str):
        with plain_errors(where, {ValueError: "{}: 'tools' is not JSON ({})"}):
            tools = json.loads(tools) or None
    if tools is not None and not is_chat(tools):
        raise JaxDeltaError(f"{where}: 'tools' must be a list of JSON schemas")
    return Conversation(messages, where, tools)


def _with_system(messages: tuple[Message, ...], system: Any, where: str) -> tuple[Message, ...]:
    """The messages with a row's own system prompt in front."""
    first = _message({"role": "system", "content": system}, f"{where}: 'system'")
    if messages[0]["role"] != "system":
        return first, *messages
    if messages[0] != first:
        raise JaxDeltaError(f"{where}: 'system' and the messages' own system prompt disagree; remove one")
    return messages


def _message(item: Any, where: str) -> Message:
    message = {key: value for key, value in dict(item).items() if value is not None}
    if "role" not in message and "from" in message:
        if not isinstance(name := message["from"], str) or name not in _SHARED:
            raise JaxDeltaError(f"{where}: 'from' is {name!r:.50}, none of {', '.join(_SHARED)}")
        message = {"role": _SHARED[name], "content": message.get("value")}
    if not isinstance(message.get("role"), str):
        raise JaxDeltaError(f"{where}: has no 'role', only {', '.join(map(str, message))[:100] or 'nothing'}")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise JaxDeltaError(f"{where}: has a part of type {kind!s:.50}; only text is read")
    if not isinstance(content, str) and not parts and not message.get("tool_calls"):
        kind = "nothing" if content is None else type(content).__name__
        raise JaxDeltaError(f"{where}: 'content' must be text, not {kind}")
    return message
