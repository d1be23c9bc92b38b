"""Conversations: turns of roles and text out of a row, and their rendering by a model's chat template."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from wina_calib.errors import CorpusError

# Roles in the older way of writing conversations, and what chat templates call them.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_TEXT_PARTS = ("text", "input_text", "output_text")

logger = logging.getLogger(__name__)


class Conversation(str):
    """A document that is a conversation. As text it is `role: content` lines."""

    turns: tuple[dict[str, Any], ...]  # messages as chat templates take them, contents as text

    def __new__(cls, turns: Sequence[Mapping[str, Any]]) -> Conversation:
        """A conversation of messages with `role` and `content`."""
        text = super().__new__(cls, valid("\n".join(f"{t['role']}: {t['content']}".rstrip(" ") for t in turns)))
        text.turns = tuple(map(dict, turns))
        return text


def conversation(value: Sequence[Mapping[str, Any] | None], where: str) -> Conversation:
    """The conversation in a field of a row.

    Args:
        value: messages with `role` and `content`, or `from` and `value`; a content is text or a list of parts. Null is nothing.
        where: the row's place and field, for messages.

    Raises:
        CorpusError: a message holds something else.
    """
    return Conversation([_turn(turn, where) for turn in value if turn is not None])


def is_conversation(value: object) -> bool:
    """Whether a field of a row holds a list of messages; some of them may be null."""
    return isinstance(value, list) and any(value) and all(turn is None or isinstance(turn, dict) for turn in value)


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how its model is talked to."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(document: str, tokenizer: Any) -> str:
    """A document as the model reads it: a conversation by the chat template, where there is one.

    Templates differ in the roles and orders that they take. What one refuses is given to it once more with the system's
    words in the first message and neighbours of one role joined; what it refuses then stays `role: content` lines.
    """
    if not isinstance(document, Conversation) or not has_template(tokenizer):
        return document
    for turns in (document.turns, _plain(document.turns)):
        try:
            text = str(tokenizer.apply_chat_template(list(turns), tokenize=False))
        except Exception:  # templates raise what they like
            logger.debug("the chat template does not take a conversation", exc_info=True)
            continue
        # Blocks begin with it already.
        return valid(text.removeprefix(getattr(tokenizer, "bos_token", None) or ""))
    return str(document)


def valid(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and no tokenizer takes, by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    role, content = turn.get("role", turn.get("from", "")), turn.get("content", turn.get("value"))
    kept = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
    return {"role": _ROLES.get(str(role), str(role)), "content": _text(content, where)} | kept


def _text(content: object, where: str) -> str:
    """The text of a message; of parts of several kinds, that of the texts."""
    if content is None:  # a turn that only calls a tool
        return ""
    if isinstance(content, str):
        return content
    parts = [part for part in content if part is not None] if isinstance(content, list) else []
    odd = content if not isinstance(content, list) else next((p for p in parts if not isinstance(p, str | dict)), None)
    if odd is not None:
        found = f"{'a list with ' if isinstance(content, list) else ''}a value of type {type(odd).__name__}"
        raise CorpusError(f"{where}: a message holds {found}; expected text, or a list of parts.")
    texts = [part if isinstance(part, str) else _part(part) for part in parts]
    return "\n".join(text for text in texts if text)


def _part(part: Mapping[str, Any]) -> str:
    text = part.get("text") if part.get("type", "text") in _TEXT_PARTS else None
    return text if isinstance(text, str) else ""


def _plain(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """User and assistant in turns, the user first: what every chat template takes."""
    joined: list[dict[str, str]] = []
    for turn in turns:
        role = "assistant" if turn["role"] == "assistant" else "user"
        if joined and joined[-1]["role"] == role:
            joined[-1]["content"] += "\n\n" + turn["content"]
        elif joined or role == "user":
            joined.append({"role": role, "content": turn["content"]})
    return joined
