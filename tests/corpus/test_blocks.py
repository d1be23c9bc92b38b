"""Data specs, Hub datasets, packing into blocks, and the overlap of sources."""

import hashlib
import json
import logging
import random
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from wina_calib.corpus import blocks
from wina_calib.corpus.blocks import Blocks, fingerprint, load_blocks, text_hashes
from wina_calib.corpus.sources import check_spec, documents
from wina_calib.errors import CorpusError, UsageError, WinaError

DEMO = Path(__file__).parents[2] / "wina_calib" / "data" / "demo-llama-5m"
BOS, EOS = 1, 2


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record):
        self.records.append(record)


class Characters:
    """One token a character, above the two special ones."""

    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> SimpleNamespace:
        ids = [ord(c) + 3 for c in text]
        return SimpleNamespace(input_ids=[BOS, *ids] if add_special_tokens else ids)


class Bare(Characters):
    """A tokenizer with neither BOS nor EOS."""

    bos_token_id = None
    eos_token_id = None

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> SimpleNamespace:
        return super().__call__(text, add_special_tokens=False, verbose=verbose)


class Framed(Characters):
    """A tokenizer that puts two tokens before a text and one after it."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> SimpleNamespace:
        ids = super().__call__(text, add_special_tokens=False, verbose=verbose).input_ids
        return SimpleNamespace(input_ids=[BOS, 0, *ids, EOS] if add_special_tokens else ids)


def pack(
    *specs: object, tokenizer: Characters | None = None, samples: int = 4, seq_len: int = 16, **more: int
) -> Blocks:
    options = {"seed": 0, "min_tokens": 1} | more
    return load_blocks([str(s) for s in specs], tokenizer or Characters(), samples=samples, seq_len=seq_len, **options)


def decoded(blocks: Blocks) -> list[str]:
    return ["".join("?<>"[i] if i < 3 else chr(i - 3) for i in row) for row in blocks.ids.tolist()]


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch) -> list[tuple[object, ...]]:
        calls: list[tuple[object, ...]] = []

        def load_dataset(path, name=None, *, split, streaming):
            calls.append((path, name, split, streaming))
            return iter([{"text": "one", "body": "two", "content": "three"}])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    @pytest.mark.parametrize(
        ("spec", "call", "text"),
        [
            ("hub:some/data", ("some/data", None, "train", True), "one"),
            ("hub:some/data:en", ("some/data", "en", "train", True), "one"),
            ("hub:some/data:en:test", ("some/data", "en", "test", True), "one"),
            ("hub:some/data:en:test:body", ("some/data", "en", "test", True), "two"),
            ("hub:some/data:::body", ("some/data", None, "train", True), "two"),
            ("hub:some/data::test", ("some/data", None, "test", True), "one"),
            ("c4", ("allenai/c4", "en", "train", True), "one"),
            ("c4:validation", ("allenai/c4", "en", "validation", True), "one"),
            ("codeparrot", ("codeparrot/codeparrot-clean-valid", None, "train", True), "three"),
        ],
    )
    def test_what_is_asked_of_datasets(self, asked, spec, call, text):
        assert list(documents(spec)) == [text]
        assert asked == [call]

    def test_a_bad_spec_is_found_without_reading(self, asked):
        for spec in ("hub:", "hub: ", "hub::en", "hub:a:b:c:d:e"):
            with pytest.raises(UsageError, match=r"hub:NAME\[:config\]"):
                check_spec(spec)
        assert asked == []

    def test_a_stream_is_not_read_whole(self, monkeypatch):
        served = Counter()

        def load_dataset(*_, **__):
            def rows():
                while True:
                    served["rows"] += 1
                    yield {"text": f"row {served['rows']} " * 20}

            return rows()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert pack("hub:endless/stream", samples=50, seq_len=100).ids.shape == (50, 100)
        assert served["rows"] <= blocks._SHUFFLE_DOCUMENTS + blocks._SPREAD * 50

    def test_chats(self, monkeypatch):
        rows = [
            {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]},
            {"messages": [{"from": "human", "value": "Call it."}, {"from": "gpt", "value": None}]},
        ]
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(rows))
        assert list(documents("ultrachat")) == ["user: Hi.\nassistant: Hello.", "user: Call it.\nassistant:"]

    def test_missing_column(self, asked):
        with pytest.raises(CorpusError, match=r"row 0: there is no field 'story'; found text, body, content\."):
            list(documents("hub:some/data:::story"))

    def test_errors_of_the_library_become_ours(self, monkeypatch):
        def load_dataset(*_, **__):
            raise ConnectionError("no route\nlong trace")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(CorpusError, match="config en, split train could not be read: no route Check") as caught:
            list(documents("c4"))
        assert "trace" not in str(caught.value)

    @pytest.mark.parametrize("name", ["folder", "with:colon"])
    def test_a_local_dataset_folder(self, tmp_path, name):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "rows.jsonl", {"text": "one"}, {"text": "two"})
        assert list(documents(f"hub:{tmp_path / name}")) == ["one", "two"]

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(CorpusError, match="could not be read"):
            list(documents(f"hub:{tmp_path / 'absent'}"))


class TestPacking:
    def test_bos_first_eos_between_and_no_padding(self, tmp_path):
        file = write_jsonl(tmp_path / "a.jsonl", {"text": "abcde"}, {"text": " \n"}, {"text": "fghij"})
        (block,) = decoded(pack(file, samples=1, seq_len=12))
        assert block in ("<abcde>fghij", "<fghij>abcde")

    def test_without_bos_and_eos(self, tmp_path):
        file = write_jsonl(tmp_path / "a.jsonl", {"text": "abcde"}, {"text": "fghij"})
        assert decoded(pack(file, tokenizer=Bare(), samples=9, seq_len=5, seed=1)) in (
            ["abcde", "fghij"],
            ["fghij", "abcde"],
        )

    def test_whatever_the_tokenizer_puts_first(self, tmp_path):
        (tmp_path / "a.txt").write_text("abcdefgh")
        blocks = pack(tmp_path, tokenizer=Framed(), samples=2, seq_len=6)
        assert blocks.ids[:, :2].tolist() == [[BOS, 0], [BOS, 0]]
        assert sorted(blocks.ids[:, 2:].flatten().tolist()) == [ord(c) + 3 for c in "abcdefgh"]

    def test_fewer_blocks_than_asked_are_used(self, tmp_path):
        (tmp_path / "a.txt").write_text("x" * 100)
        blocks = pack(tmp_path, samples=50, seq_len=11)
        assert blocks.ids.shape == (10, 11)
        assert blocks.tokens == 110
        assert blocks.requested == 50
        assert blocks.data == (str(tmp_path),)

    def test_mixed_evenly(self, tmp_path):
        for name, size in (("a", 1000), ("b", 1000), ("c", 25)):
            (tmp_path / f"{name}.txt").write_text(name * size)
        specs = [tmp_path / f"{name}.txt" for name in "abc"]
        assert (
            "".join(block[1] for block in decoded(pack(*specs, samples=11, seq_len=11))) == "abcabcababa"[:6] + "abab"
        )
        assert "".join(block[1] for block in decoded(pack(*specs[:2], samples=5, seq_len=11))) == "ababa"

    def test_a_source_of_its_own_each(self, tmp_path):
        (tmp_path / "a.txt").write_text("a" * 100)
        (tmp_path / "b.txt").write_text("b" * 100)
        with pytest.raises(UsageError, match="1 blocks asked from 2 data sources"):
            pack(tmp_path / "a.txt", tmp_path / "b.txt", samples=1)
        with pytest.raises(UsageError, match="is given twice"):
            pack(tmp_path / "a.txt", tmp_path / "a.txt")
        with pytest.raises(UsageError, match="no data was given"):
            pack()

    def test_seeded(self, tmp_path):
        file = write_jsonl(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(300)))
        first, again, other = pack(file), pack(file), pack(file, seed=1)
        assert torch.equal(first.ids, again.ids)
        assert first.fingerprint == again.fingerprint
        assert first.fingerprint != other.fingerprint
        assert first.ids.dtype == torch.int64

    def test_the_path_does_not_change_the_order(self, tmp_path, monkeypatch):
        file = write_jsonl(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(300)))
        monkeypatch.chdir(tmp_path)
        assert pack("a.jsonl").fingerprint == pack(file).fingerprint

    @pytest.mark.parametrize("samples", [7, 16, 50])
    def test_every_beginning_is_spread_over_the_source(self, tmp_path, samples):
        # One letter a block, 8 kinds of text in order: what is used of each differs by three blocks at most.
        (tmp_path / "a.txt").write_text("".join(letter * 900 for letter in "abcdefgh"))
        drawn = [
            "".join(row)[1] for row in decoded(pack(tmp_path, tokenizer=Bare(), samples=samples, seq_len=9, seed=3))
        ]
        for first in range(1, samples + 1):
            used = Counter(drawn[:first])
            assert max(used.values()) - min(used[letter] for letter in "abcdefgh") <= 3

    def test_fingerprint_is_of_ids_and_shape(self):
        ids = torch.arange(6).reshape(2, 3)
        digest = hashlib.sha256(b"(2, 3)" + b"".join(i.to_bytes(4, "little") for i in range(6))).hexdigest()
        assert fingerprint(ids) == digest
        assert fingerprint(ids.reshape(3, 2)) != digest
        assert fingerprint(ids.t().contiguous().t()) == digest

    def test_shuffle_is_bounded(self, monkeypatch):
        monkeypatch.setattr(blocks, "_SHUFFLE_CHARACTERS", 1000)
        taken = Counter()

        def texts():
            for i in range(500):
                taken["texts"] += 1
                yield f"{i:050d}"

        order = blocks._shuffled(texts(), 0)
        next(order)
        assert taken["texts"] == 20
        assert sorted([*order]) != [*order]

    def test_every_document_survives_the_shuffle(self, monkeypatch):
        monkeypatch.setattr(blocks, "_SHUFFLE_DOCUMENTS", 10)
        texts = [str(i) for i in range(97)]
        assert sorted(blocks._shuffled(iter(texts), 5)) == sorted(texts)

    @pytest.mark.parametrize("content", ["", " \n\n "])
    def test_no_text(self, tmp_path, content):
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(CorpusError, match=r"a\.txt'?: it holds no text; at least 16 tokens .*--data"):
            pack(tmp_path / "a.txt")

    def test_less_than_a_block(self, tmp_path):
        (tmp_path / "a.txt").write_text("x" * 100)
        (tmp_path / "b.txt").write_text("x" * 10_000)
        with pytest.raises(CorpusError, match=r"a\.txt'?: it holds only 100 tokens, less than a block of 200"):
            pack(tmp_path / "b.txt", tmp_path / "a.txt", seq_len=200)

    def test_too_short(self, tmp_path):
        (tmp_path / "a.txt").write_text("x" * 7_999)
        options = {"samples": 128, "seq_len": 100, "min_tokens": blocks.MIN_TOKENS}
        assert blocks.MIN_TOKENS == 8_000
        assert pack(tmp_path, **options).tokens == 8_000
        (tmp_path / "a.txt").write_text("x" * 7_900)
        with pytest.raises(
            CorpusError, match="only 7,900 tokens in whole blocks of 100; at least 8,000 are needed. Give more"
        ):
            pack(tmp_path, **options)
        with pytest.raises(
            UsageError,
            match="10 blocks of 100 tokens were asked for, 1,000 in all; .* at this length, --samples 80 or more",
        ):
            pack(tmp_path, **options | {"samples": 10})
        with pytest.raises(UsageError, match="--samples 80 or more, with --quick 60."):
            pack(tmp_path, **options | {"samples": 10, "quick_tokens": 6_000})
        with pytest.raises(CorpusError, match="at least 8,000 are needed, 6,000 with --quick. Give more"):
            pack(tmp_path, **options | {"quick_tokens": 6_000})

    def test_no_room_in_a_block(self, tmp_path):
        (tmp_path / "a.txt").write_text("x" * 100)
        with pytest.raises(UsageError, match="seq-len is 2"):
            pack(tmp_path, tokenizer=Framed(), seq_len=2)

    def test_a_long_document_takes_linear_time(self, tmp_path):
        file = write_jsonl(tmp_path / "a.jsonl", {"text": "some words " * 100_000})
        start = time.process_time()
        assert pack(file, samples=10**6, seq_len=4).ids.shape == (366_666, 4)
        assert time.process_time() - start < 10

    def test_reading_a_long_source_stops_when_there_is_enough(self, monkeypatch):
        monkeypatch.setattr(blocks, "_SHUFFLE_CHARACTERS", 1000)

        class Counting(Characters):
            read = 0

            def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> SimpleNamespace:
                Counting.read += len(text)
                return super().__call__(text, add_special_tokens=add_special_tokens, verbose=verbose)

        pack("builtin", tokenizer=Counting(), samples=2, seq_len=100)
        assert Counting.read < 20_000


class TestRealTokenizer:
    def test_builtin_fills_blocks(self):
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        blocks = load_blocks(["builtin"], tokenizer, samples=128, seq_len=512, seed=0)
        assert len(blocks.ids) == 128
        assert bool((blocks.ids[:, 0] == tokenizer.bos_token_id).all())
        assert bool((blocks.ids >= 0).all())
        assert bool((blocks.ids < len(tokenizer)).all())
        assert int((blocks.ids == tokenizer.eos_token_id).sum()) > 10

    def test_heldout_has_enough_for_an_evaluation(self):
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        assert load_blocks(["builtin:heldout"], tokenizer, samples=64, seq_len=512, seed=0).tokens >= 32_768

    def test_no_warning_about_long_texts(self, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(DEMO, model_max_length=64)
        (tmp_path / "a.txt").write_text("A text much longer than the model takes. " * 500)
        handler = Records()
        records = handler.records
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_info()
        logging.getLogger("transformers").addHandler(handler)
        try:
            load_blocks([str(tmp_path)], tokenizer, samples=10, seq_len=32, seed=0, min_tokens=1)
        finally:
            logging.getLogger("transformers").removeHandler(handler)
            transformers_logging.set_verbosity(level)
        assert [record.getMessage() for record in records] == []


class TestOverlap:
    def test_lines_in_common(self, tmp_path):
        shared = "a line that two files have in common, word for word"
        (tmp_path / "a.txt").write_text(f"{shared}\nshort\n{'only here ' * 8}\n")
        (tmp_path / "b.txt").write_text(f"short\n   {shared}\n")
        first, second = text_hashes([str(tmp_path / "a.txt")]), text_hashes([str(tmp_path / "b.txt")])
        assert (len(first), len(second), len(first & second)) == (2, 1, 1)

    def test_limit(self, tmp_path):
        rows = ({"text": f"a line that is long enough to be counted {i}"} for i in range(1000))
        assert len(text_hashes([str(write_jsonl(tmp_path / "a.jsonl", *rows))], limit=10)) == 10


class TestFuzz:
    """Whatever is given, only our own errors come out."""

    def test_specs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"text": "x"}]))
        write_jsonl(tmp_path / "a.jsonl", {"text": "x", "b": "y"})
        (tmp_path / "b.txt").write_text("x")
        (tmp_path / "d").mkdir()
        words = "builtin hub c4 wikitext2 heldout en text b a/b a.jsonl b.txt d : : :: / .. . - ~ * {} %s é \0 \udcff"
        parts = [*words.split(), " ", "\n", "x" * 300]
        rng = random.Random(0)
        outcomes: Counter[str] = Counter()
        for _ in range(2500):
            spec = "".join(rng.choices(parts, k=rng.randrange(6)))
            if ".." in spec or spec.startswith("/"):  # what lies outside the test's folder may be large
                continue
            try:
                for _ in zip(documents(spec), range(3), strict=False):
                    pass
                outcomes["read"] += 1
            except WinaError as error:
                assert len(str(error)) < 2000
                outcomes[type(error).__name__] += 1
        assert min(outcomes[name] for name in ("read", "UsageError", "CorpusError")) > 10, outcomes
