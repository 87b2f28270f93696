"""Chats: lists of messages -> texts through the model's own chat template, with the role of each character.

A message's characters are its content, with reasoning and tool calls, and the end token after it, as the
labels of supervised fine-tuning; headers belong to no role. Where a template marks what the assistant says
(`{% generation %}`), these marks count. Otherwise the template is applied a second time, to messages whose
texts are replaced by placeholders: it must write the same around them.
"""

import hashlib
import importlib
import itertools
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int8

from jaxdelta.errors import JaxDeltaError, UsageError, extra, first_line, plain_errors
from jaxdelta.text.messages import ASSISTANT, Conversation, Message, conversation, is_chat
from jaxdelta.text.messages import KEYS as CHAT_KEYS
from jaxdelta.text.tokenizer import load_tokenizer

NO_ROLE = "template"
_TAGS = re.compile(r"(</?(?:think|tool_call|tool_response)>)")  # templates look for these in a content
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATED = "strftime_now"
_SHOWN = 300  # characters of a template's own message


class Chat(str):
    """A chat as the model reads it; `roles[i]` is the number of character i's role in `source.roles`."""

    roles: Int8[np.ndarray, " n"]
    source: "ChatTemplate"


class ChatTemplate:
    """The chat template of a model's directory; `roles` are the names met so far, the first of no role."""

    def __init__(self, directory: Path, measured: str | None = None):
        """`measured` is the role that must be found in every chat, if any."""
        self.roles: list[str] = [NO_ROLE]
        self._directory, self._measured = directory, measured
        self._unplaced = 0
        self._left_out: Counter[str] = Counter()

    @cached_property
    def _tokenizer(self) -> Any:
        with extra("corpora", f"{self._directory}: its chat template"):
            importlib.import_module("jinja2")  # transformers does so only when it applies a template
        tokenizer = load_tokenizer(self._directory)
        file = self._directory / "chat_template.json"
        if tokenizer.chat_template is None and file.is_file():
            wrong = (OSError, ValueError, KeyError, TypeError)
            with plain_errors(file, {wrong: "{}: holds no chat template ({})"}, reason=repr):
                tokenizer.chat_template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        return tokenizer

    @cached_property
    def template(self) -> str:
        """The template's text: the default one of several.

        Raises:
            JaxDeltaError: there is none.
        """
        if self._tokenizer.chat_template is None:
            raise JaxDeltaError(
                f"{self._directory}: has no chat template, which chats need; add the model's "
                "chat_template.jinja, or give plain text"
            )
        with plain_errors(self._directory, {Exception: "{}: has no usable chat template ({})"}):
            return str(self._tokenizer.get_chat_template())

    @property
    def digest(self) -> str:
        """SHA-256 of the template, in hexadecimal."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the chats read so far, a sentence each."""
        if len(self.roles) == 1 and not self._unplaced:
            return ()
        notes = [f"chats were written by the model's template (SHA-256 {self.digest[:12]}...)"]
        if _DATED in self.template:
            notes.append("the chat template writes today's date, so the text is another one tomorrow")
        for role, count in self._left_out.items():
            notes.append(f"the chat template leaves out {count} messages of the role {role}")
        if self._unplaced:
            notes.append(f"the roles of {self._unplaced} chats are unknown: the template rewrites messages")
        return tuple(notes)

    def chat(self, given: Conversation) -> Chat:
        """The chat as the model reads it.

        Raises:
            JaxDeltaError: the template refuses the messages, or hides the measured role's.
        """
        text, marks = self._rendered(given.messages, given.tools, given.where)
        for message in given.messages:
            if isinstance(content := message.get("content"), list) and str(content) in text:
                raise JaxDeltaError(f"{given.where}: the chat template reads no content in parts; join them")
        spans = self._placed(given, text)
        if spans is None:
            self._unplaced += 1
            if self._measured not in (None, ASSISTANT if marks else None):
                raise JaxDeltaError(
                    f"{given.where}: the chat template rewrites messages, so their places for "
                    f"--measure={self._measured} are unknown; use --measure=all"
                )
        roles = np.zeros(len(text), np.int8)
        for start, stop, role in spans or ():
            if not (marks and role == ASSISTANT):
                roles[start:stop] = self._number(role)
        for start, stop in marks:
            roles[start:stop] = self._number(ASSISTANT)
        chat = Chat(text)
        chat.roles, chat.source = roles, self
        return chat

    def _number(self, role: str) -> int:
        if role not in self.roles:
            self.roles.append(role)
        return min(self.roles.index(role), 127)

    def _rendered(
        self, messages: Sequence[Message], tools: Any, where: str, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and what the template marks as the assistant's."""
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = bool(_MARKED.search(self.template))
        with plain_errors(
            where, {Exception: "{}: the chat template refuses the chat ({})"}, reason=_shortened
        ):
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
            )
            if not marked or prompt:
                return text, []
            _, (marks,) = render_jinja_template(
                [list(messages)],
                tools=tools,
                chat_template=self._tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        return text, marks

    def _placed(self, given: Conversation, text: str) -> list[tuple[int, int, str]] | None:
        """The characters of each message, or None if they are not where the placeholders are."""
        mark = next(letter for letter in map(chr, itertools.count(0xF0000)) if letter not in text)
        places: list[_Place] = []
        masked = [_masked(message, n, mark, places) for n, message in enumerate(given.messages)]
        try:
            skeleton, _ = self._rendered(masked, given.tools, given.where)
        except JaxDeltaError:
            return None
        literals = re.split(f"{mark}(\\d+){mark}", skeleton)
        spans: list[tuple[int, int, int]] = []  # start, stop, message
        at = len(literals[0])
        for i in range(1, len(literals), 2):
            place = places[int(literals[i])]
            if not text.startswith(literals[i - 1] + place.text, at - len(literals[i - 1])):
                return None
            if not spans or spans[-1][2] != place.message:
                start = self._start(given, place, literals[i - 1])
                spans.append((at - start, at, place.message))
            at += len(place.text)
            spans[-1] = spans[-1][0], at + self._end(given, place, literals[i + 1]), place.message
            at += len(literals[i + 1])
        if at != len(text) or not text.endswith(literals[-1]):
            return None
        for number in {place.message for place in places} - {number for *_, number in spans}:
            self._left_out[given.messages[number]["role"]] += 1
        return [(start, stop, given.messages[number]["role"]) for start, stop, number in spans]

    def _start(self, given: Conversation, place: "_Place", literal: str) -> int:
        """How many characters of the literal before a message's first placeholder are the message's."""
        header = self._ends.header
        answer = place.inner and given.messages[place.message]["role"] == ASSISTANT
        if answer and header and header in literal:
            return len(literal.rpartition(header)[2])
        return len(place.before) if literal.endswith(place.before) else 0

    def _end(self, given: Conversation, place: "_Place", literal: str) -> int:
        """How many characters of the literal after a message's last placeholder are the message's."""
        if given.messages[place.message].get("tool_calls"):
            ended = self._ends.token.search(literal)
            return ended.end() if ended else 0
        after = len(place.after) if literal.startswith(place.after) else 0
        ended = self._ends.token.match(literal, after)
        return ended.end() if ended else after

    @cached_property
    def _ends(self) -> "_Ends":
        """How the template begins an assistant's message, and the tokens that end one."""
        question, answer = {"role": "user", "content": "\uf8ff"}, {"role": ASSISTANT, "content": "\uf8fe"}
        tokens = {self._tokenizer.eos_token} - {None}
        special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        header = ""
        try:
            asked, _ = self._rendered([question], None, "")
            prompted, _ = self._rendered([question], None, "", prompt=True)
            if prompted.startswith(asked):
                header = prompted[len(asked) :]
            after = self._rendered([question, answer], None, "")[0].rpartition("\uf8fe")[2].lstrip()
            tokens |= {token for token in special if token and after.startswith(token)}
        except JaxDeltaError:
            pass
        pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        return _Ends(header, re.compile(rf"\s*(?:{pattern})" if pattern else r"(?!)"))


class _Ends(NamedTuple):
    header: str
    token: re.Pattern[str]


class _Place(NamedTuple):
    """A text that a placeholder replaces: its message, whether that has reasoning or tool calls, and the tags
    before and after it."""

    message: int
    text: str
    inner: bool = False
    before: str = ""
    after: str = ""


def _masked(message: Message, number: int, mark: str, places: list[_Place]) -> Message:
    """The message with placeholders for its texts, which are added to `places`.

    Space around a text stays, and so do tags that templates look for.
    """
    thinks = [key for key in ("reasoning_content", "reasoning", "thinking") if key in message]
    content = message.get("content")
    inner = bool(thinks or message.get("tool_calls")) or (isinstance(content, str) and "</think>" in content)

    def placed(text: str, before: str = "", after: str = "") -> str:
        if not (core := text.strip()):
            return text
        places.append(_Place(number, core, inner, before, after))
        return text.replace(core, f"{mark}{len(places) - 1}{mark}")

    def tagged(text: str) -> str:
        parts = _TAGS.split(text)
        full = [i for i in range(0, len(parts), 2) if parts[i].strip()]
        for i in full:
            before = "".join(parts[:i]).lstrip() + _space(parts[i], 0) if i == full[0] and i else ""
            after = _space(parts[i], 1) + "".join(parts[i + 1 :]).rstrip() if i == full[-1] else ""
            parts[i] = placed(parts[i], before, after if after.strip() else "")
        return "".join(parts)

    masked = dict(message)
    for key in thinks:
        masked[key] = placed(message[key]) if isinstance(message[key], str) else message[key]
    if isinstance(content, str):
        masked["content"] = tagged(content)
    elif content:
        masked["content"] = [dict(part) | {"text": placed(part["text"])} for part in content]
    if isinstance(calls := message.get("tool_calls"), list):
        masked["tool_calls"] = [_masked_call(call, placed) for call in calls]
    return masked


def _masked_call(call: Any, placed: Callable[[str], str]) -> Any:
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        return dict(call) | {"function": _masked_call(call["function"], placed)}
    if isinstance(call, Mapping) and isinstance(call.get("name"), str):
        return dict(call) | {"name": placed(call["name"])}
    return call


def _space(text: str, side: int) -> str:
    """The space before (0) or after (1) a text."""
    return text[: len(text) - len(text.lstrip())] if side == 0 else text[len(text.rstrip()) :]


def _shortened(error: Exception) -> str:
    return textwrap.shorten(first_line(error), _SHOWN, placeholder=" ...")


def rendered(documents: Iterable[Any], template: ChatTemplate | None) -> Iterator[Any]:
    """The documents, chats among them as texts; without a template, chats are refused.

    Raises:
        JaxDeltaError: a chat that is not to be read or that the template refuses; chats next to plain texts.
        UsageError: messages that are not in a list for each chat.
    """
    chats: bool | None = None
    for number, document in enumerate(documents, 1):
        found = _conversation(document, f"document {number}")
        if found and template is None:
            raise JaxDeltaError(
                f"{found.where}: is a chat (a list of messages), which --chat=off does not read; leave the "
                "flag out, or choose a text with --text_key"
            )
        if chats is not None and chats != (found is not None):
            raise JaxDeltaError(f"document {number}: chats and plain texts cannot be read together")
        chats = found is not None
        yield template.chat(found) if found and template else document


def _conversation(document: Any, where: str) -> Conversation | None:
    if isinstance(document, Mapping):
        key = next((key for key in CHAT_KEYS if is_chat(document.get(key))), None)
        if key:
            return conversation(document[key], where, document)
        if "role" in document:
            raise UsageError(
                f"calibration: {where} is a message; give a list of chats, each a list of messages"
            )
    if is_chat(document):
        return conversation(document, where)
    return document if isinstance(document, Conversation) else None
