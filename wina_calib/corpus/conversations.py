"""The built-in conversations: hand-written ones, and documents of the built-in text as answers to who asked for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wina_calib.corpus.chat import Conversation

_LABEL = re.compile(r"^\**(Task|Question|Q|Prompt|Advice wanted):\**\s*")
_SPEAKER = re.compile(r"^(User|Assistant): ", re.MULTILINE)
# What an English document's title is asked for by, by kind; several that take turns.
_REQUESTS: dict[str, tuple[str, ...]] = {
    "fiction": ('Write a short story called "{title}".', 'I would like to read a story. Its title: "{title}".'),
    "essay": ('Write an essay with the title "{title}".', 'Could you write me a personal essay? Call it "{title}".'),
    "encyclopaedic": (
        "What is meant by this, and where does it come from: {title}?",
        "Tell me about {title}.",
        "{title}?",
    ),
    "news": ('Write the news article to this headline: "{title}"', "{title}\n\nWrite that as a local paper would."),
    "technical": ("I need a document for my colleagues: {title}", "Write this up properly, please. {title}"),
    "legal": ("Draft this for me, please: {title}", "Can you show me what one looks like? {title}"),
    "tables": ("Put this into a form that I can print: {title}", "I need the data behind this one: {title}"),
    "mathematics": ("Explain this with every step: {title}", "Help me with this, I am stuck. {title}"),
    "dialogue": ("Write a scene in dialogue: {title}", "How might such a conversation go? {title}"),
}
_GO_ON = ("Go on, please.", "And then?", "Thanks. What comes next?", "That helps. Is there more?", "ok, continue")
_MOST = 4000  # characters of an answer
_SYSTEM = "You are a helpful assistant."


def conversations(
    documents: Sequence[Mapping[str, str]], written: Sequence[Mapping[str, Any]]
) -> Iterator[Conversation]:
    """Hand-written conversations and those made of documents, by turns.

    Documents have `text`, `kind` and `language`; what is written has `messages` with `role` and `content`.
    """
    made = [turns for number, document in enumerate(documents) if (turns := _made(document, number))]
    every = max(1, len(made) // max(1, len(written)))
    waiting = iter(written)
    for number, turns in enumerate(made):
        if number % every == 0 and (short := next(waiting, None)) is not None:
            yield Conversation(short["messages"])
        system = [{"role": "system", "content": _SYSTEM}] if number % 3 == 0 else []
        yield Conversation([*system, *turns])
    for short in waiting:
        yield Conversation(short["messages"])


def _made(document: Mapping[str, str], number: int) -> list[dict[str, str]]:
    """A document as a conversation; empty for one that has no place in any."""
    text, kind = document["text"], document["kind"]
    if kind == "dialogue" and text.startswith("User: "):  # as it stands
        return _turns([part.strip() for part in _SPEAKER.split(text)[2::2]])
    if kind == "code":
        return _code(document)
    title, _, body = text.partition("\n\n")
    if kind == "instruction":
        return _asked(title, body)
    title = re.sub(r"\\\w+\*?\{|[#*{}]", "", title).strip()
    if len(title) > 150 or "\n" in title or not body:  # no title: the beginning is the request, to be gone on with
        cut = max(text.find(" ", 120), 120)
        return _turns([f"{text[:cut]} ...", text[cut:].strip()]) if len(text) > cut else []
    requests = _REQUESTS.get(kind) if document["language"] == "en" else None
    ask = requests[number % len(requests)].format(title=title) if requests else title
    return _in_parts(ask, body, number)


def _asked(question: str, answer: str) -> list[dict[str, str]]:
    """A question with its answer; what is quoted after the question belongs to it."""
    question = _LABEL.sub("", question.strip("*")).strip()
    quoted, blocks = [], answer.split("\n\n")
    while len(blocks) > 1 and blocks[0].startswith((">", "*Notes", '"', "```")):
        quoted.append(blocks.pop(0))
    return _turns(["\n\n".join([question, *quoted]), "\n\n".join(blocks)[:_MOST]])


def _code(document: Mapping[str, str]) -> list[dict[str, str]]:
    """A file as the answer to a request by its first comment."""
    lines = [line.strip(" \t#/*-!\"'|;<>") for line in document["text"].split("\n")[:12]]
    first = next((line for line in lines if " " in line and not re.search("import|usr/bin|frozen_string", line)), "")
    if not first:
        return []
    language, body = document["language"], document["text"][:_MOST]
    return _turns([f"Write this in {language}: {first}", f"```{language}\n{body}\n```"])


def _in_parts(ask: str, body: str, number: int) -> list[dict[str, str]]:
    """A text in one answer or in several, asked for one after the other."""
    paragraphs = body[:_MOST].split("\n\n")
    parts = min(1 + number % 3, len(paragraphs))
    edges = [len(paragraphs) * i // parts for i in range(parts + 1)]
    answers = ["\n\n".join(paragraphs[low:high]) for low, high in zip(edges, edges[1:], strict=False)]
    said = [ask, answers[0]]
    for i, answer in enumerate(answers[1:]):
        said += [_GO_ON[(number + i) % len(_GO_ON)], answer]
    return _turns(said)


def _turns(said: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
