"""Documents shuffled and packed into blocks of one length; their fingerprint."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from wina_calib.corpus.chat import Conversation, has_template, render
from wina_calib.corpus.rows import Tally, shown
from wina_calib.corpus.sources import BUILTIN, CHAT, HELDOUT, documents, reader
from wina_calib.corpus.text_files import pieces
from wina_calib.errors import CorpusError, UsageError

MIN_TOKENS = 8_000
QUICK_MIN_TOKENS = 6_000  # for a first look
_SHUFFLE_DOCUMENTS = 10_000
_SHUFFLE_CHARACTERS = 32_000_000
_SPREAD = 4  # of a stream, so many times the blocks asked for are read, to take them from more documents
_GOLDEN = (5**0.5 - 1) / 2
_OVERLAP_LINE = 40


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that packing needs."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        """Return an object with `input_ids`."""


@dataclass(frozen=True)
class Blocks:
    """Packed text."""

    ids: Tensor  # (blocks, seq_len) int64
    data: tuple[str, ...]  # the specs
    requested: int  # number of blocks asked for
    fingerprint: str  # SHA-256 of ids and shape
    notes: tuple[str, ...] = ()  # what to tell the user about the text

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.ids.numel()

    def first(self, count: int) -> Blocks:
        """So many of the first blocks."""
        ids = self.ids[:count]
        return replace(self, ids=ids, requested=count, fingerprint=fingerprint(ids))


def data_for(tokenizer: Any, data: Sequence[str] = (), *, heldout: bool = False) -> tuple[str, ...]:
    """The text as it was given, or the built-in one: for a model with a chat template conversations beside plain text.

    `heldout` is the part of the built-in text that nothing is fitted on.
    """
    text = HELDOUT if heldout else BUILTIN
    return tuple(data) or ((f"{text}:{CHAT}", text) if has_template(tokenizer) else (text,))


def load_blocks(
    data: Sequence[str],
    tokenizer: Tokenizer,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    min_tokens: int = MIN_TOKENS,
    quick_tokens: int = 0,
) -> Blocks:
    """Read, tokenize and pack text, and choose blocks evenly.

    Sources are mixed evenly: each gives an equal number of blocks, or all it has, and they take turns. Blocks are chosen at
    even distances through a whole source in its own order (through the first part of a long one, shuffled), and come in an
    order whose every beginning is spread over all of it: what is sorted by kind is used in proportion. Every block starts
    with what the tokenizer puts before a text (BOS), documents are separated by EOS, and there is no padding. Fewer blocks
    than asked are used as they are. `samples` blocks of `seq_len` tokens are asked for; fewer tokens than `min_tokens` are
    an error, which says what `--quick` makes enough where the caller has that option: `quick_tokens`.

    Raises:
        CorpusError: a source is unreadable or shorter than a block, or all sources together are too short.
        UsageError: a spec does not parse or is given twice, or the blocks asked for cannot be enough.
    """
    _check_request(data, samples, seq_len, min_tokens, quick_tokens)
    shares = [samples // len(data) + (i < samples % len(data)) for i in range(len(data))]
    readers, tallies, chats = [reader(spec) for spec in data], [Tally() for _ in data], Tally()
    packed = [
        _choose(_rendered(read(tally), tokenizer, chats), tokenizer, count, seq_len, seed)
        for read, tally, count in zip(readers, tallies, shares, strict=True)
    ]
    for spec, (blocks, left) in zip(data, packed, strict=True):
        if not blocks:
            little = f"only {left:,} tokens, less than a block of {seq_len:,}" if left else "no text"
            raise CorpusError(
                f"data {shown(spec)}: it holds {little}; at least {max(min_tokens, seq_len):,} tokens are needed in all. "
                "Give more text with --data; calibrate and recover also take a smaller --seq-len."
            )
    rows = [row for turn in zip_longest(*(blocks for blocks, _ in packed)) for row in turn if row is not None]
    tokens = len(rows) * seq_len
    if tokens < min_tokens:
        raise CorpusError(
            f"data {', '.join(map(shown, data))}: only {tokens:,} tokens in whole blocks of {seq_len:,}; at least "
            f"{min_tokens:,} are needed{f', {quick_tokens:,} with --quick' if quick_tokens else ''}. Give more text with "
            "--data; calibrate and recover also take a smaller --seq-len."
        )
    ids = torch.stack(rows).long()
    notes = [tally.note(spec) for spec, tally in zip(data, tallies, strict=True)]
    if has_template(tokenizer) and chats.empty == chats.rows:
        notes.append(
            "the model has a chat template, and none of the text is a conversation: masks are fitted to plain text alone. "
            "--data builtin:chat adds conversations, as does a file with rows of messages"
        )
    return Blocks(ids, tuple(data), samples, fingerprint(ids), tuple(note for note in notes if note))


def _rendered(documents: Iterator[str], tokenizer: Any, chats: Tally) -> Iterator[str]:
    """Documents as the model reads them; those that are no conversation are counted as empty."""
    for document in documents:
        chats.rows += 1
        chats.empty += not isinstance(document, Conversation)
        yield render(document, tokenizer)


def fingerprint(ids: Tensor) -> str:
    """SHA-256 of a (blocks, seq_len) tensor of token ids and its shape."""
    digest = hashlib.sha256(f"{tuple(ids.shape)}".encode())
    digest.update(ids.to(torch.int32).contiguous().numpy().astype("<i4", copy=False).tobytes())
    return digest.hexdigest()


def text_hashes(data: Sequence[str], limit: int = 100_000) -> set[int]:
    """Hashes of about the first `limit` lines of some sources, to find overlap between them.

    Lines are stripped, and those shorter than 40 characters left out: code and lists share many of them by chance.

    Raises:
        CorpusError: a source cannot be read.
        UsageError: a spec does not parse.
    """
    hashes: set[int] = set()
    for spec in data:
        for number, text in enumerate(documents(spec)):
            lines = (line for line in map(str.strip, text.splitlines()) if len(line) >= _OVERLAP_LINE)
            hashes.update(int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest()) for line in lines)
            if len(hashes) >= limit or number >= limit:
                return hashes
    return hashes


def _check_request(data: Sequence[str], samples: int, seq_len: int, min_tokens: int, quick_tokens: int) -> None:
    twice = sorted({spec for spec in data if list(data).count(spec) > 1})
    if not data:
        raise UsageError("no data was given; the built-in text is builtin.")
    if twice:
        raise UsageError(f"data {shown(twice[0])} is given twice; give each source once.")
    if samples < len(data):
        raise UsageError(f"{samples} blocks asked from {len(data)} data sources; ask for at least one from each.")
    quick = f", with --quick {-(-quick_tokens // seq_len):,}" if quick_tokens else ""
    if samples * seq_len < min_tokens:
        raise UsageError(
            f"{samples:,} blocks of {seq_len:,} tokens were asked for, {samples * seq_len:,} in all; at least "
            f"{min_tokens:,} are needed: at this length, --samples {-(-min_tokens // seq_len):,} or more{quick}."
        )


def _choose(
    texts: Iterator[str], tokenizer: Tokenizer, count: int, seq_len: int, seed: int
) -> tuple[list[Tensor], int]:
    """Pack texts into blocks (seq_len,) and choose at most `count`; also the number of tokens that fill none."""
    rng = random.Random(seed)
    documents, whole = _buffered(texts, seed)
    blocks, left = _pack(documents, tokenizer, None if whole else _SPREAD * count, seq_len)
    if len(blocks) > count:
        edges = [len(blocks) * i // count for i in range(count + 1)]
        blocks = [blocks[rng.randrange(low, high)] for low, high in pairwise(edges)]
    turn = rng.randrange(len(blocks)) if blocks else 0
    blocks = blocks[turn:] + blocks[:turn]
    # Indices whose multiple of the golden ratio has a fraction below any bound lie at even distances.
    return [blocks[i] for i in sorted(range(len(blocks)), key=lambda i: i * _GOLDEN % 1.0)], left


def _buffered(texts: Iterator[str], seed: int) -> tuple[Iterator[str], bool]:
    """The texts in their own order, and True, if they fit in the shuffle's buffer; else shuffled, and False."""
    buffer: list[str] = []
    held = 0
    for text in texts:
        buffer.append(text)
        held += len(text)
        if len(buffer) >= _SHUFFLE_DOCUMENTS or held >= _SHUFFLE_CHARACTERS:
            return _shuffled(chain(buffer, texts), seed), False
    return iter(buffer), True


def _shuffled(texts: Iterator[str], seed: int) -> Iterator[str]:
    """Shuffle through a buffer bounded in documents and in characters, so that a stream is never read whole."""
    rng = random.Random(seed)
    buffer: list[str] = []
    held = 0
    for text in texts:
        buffer.append(text)
        held += len(text)
        if len(buffer) >= _SHUFFLE_DOCUMENTS or held >= _SHUFFLE_CHARACTERS:
            last = rng.randrange(len(buffer))
            buffer[last], buffer[-1] = buffer[-1], buffer[last]
            held -= len(buffer[-1])
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def _pack(texts: Iterator[str], tokenizer: Tokenizer, limit: int | None, seq_len: int) -> tuple[list[Tensor], int]:
    """Cut one stream of tokens into blocks (seq_len,) int32, at most `limit`; also the number of tokens that fill none.

    Raises:
        UsageError: a block has no room for text.
    """
    start = _prefix(tokenizer)
    body = seq_len - len(start)
    if body < 1:
        raise UsageError(
            f"seq-len is {seq_len}; the tokenizer's {len(start)} first tokens leave no room. Give a greater one."
        )
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    blocks: list[Tensor] = []
    for text in texts:
        if not text.strip():
            continue
        if stream or blocks:
            stream += between
        for piece in pieces(text):
            stream += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
            whole = len(stream) // body if limit is None else min(len(stream) // body, limit - len(blocks))
            rows = (stream[i * body : (i + 1) * body] for i in range(whole))
            blocks += [torch.tensor(start + row, dtype=torch.int32) for row in rows]
            del stream[: whole * body]
            if len(blocks) == limit:
                return blocks, len(stream)
    return blocks, len(stream)


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text: BOS, nothing, or what else it was made to add."""
    whole = list(tokenizer("a", add_special_tokens=True, verbose=False).input_ids)
    bare = list(tokenizer("a", add_special_tokens=False, verbose=False).input_ids)
    places = range(len(whole) - len(bare) + 1)
    return next((whole[:i] for i in places if whole[i : i + len(bare)] == bare), [])
