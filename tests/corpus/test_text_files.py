"""Text files and folders as data: every format, and files of any quality."""

import contextlib
import json
import os
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from wina_calib.corpus import text_files
from wina_calib.corpus.sources import check_spec, documents, is_local
from wina_calib.errors import CorpusError, UsageError


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


class TestFiles:
    def test_txt_is_one_document(self, tmp_path):
        file = tmp_path / "a.txt"
        file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
        assert list(documents(str(file))) == ["one\n\ntwo\n"]

    def test_long_txt_is_cut_at_blank_lines(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text_files, "PIECE", 100)
        monkeypatch.setattr(text_files.pieces, "__defaults__", (100,))
        text = "\n\n".join("word " * (i % 7 + 3) for i in range(200))
        (tmp_path / "a.txt").write_text(text, "utf-8")
        found = list(documents(str(tmp_path / "a.txt")))
        assert "".join(found) == text
        assert all(len(piece) <= 100 for piece in found)
        assert all(piece.endswith("\n\n") for piece in found[:-1])

    @pytest.mark.parametrize("text", ["", "a", "a" * 250, "ab " * 90, "é\n" * 130, " " * 300, "\n" * 301])
    def test_pieces(self, text):
        found = list(text_files.pieces(text, 100))
        assert "".join(found) == text
        assert all(len(piece) <= 100 for piece in found)

    def test_jsonl(self, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_bytes(b'\xef\xbb\xbf{"text": "one", "n": 1}\r\n\n  \n{"text": "zwei \xc3\xa4"}')
        assert list(documents(str(file))) == ["one", "zwei ä"]

    def test_named_fields(self, tmp_path):
        jsonl = write_jsonl(tmp_path / "a.jsonl", {"text": "no", "body": "yes"})
        parquet = write_parquet(tmp_path / "a.parquet", text=["no"], body=["yes"])
        for file in (jsonl, parquet):
            assert list(documents(str(file))) == ["no"]
            assert list(documents(f"{file}:body")) == ["yes"]
        assert list(documents(f"{tmp_path}:body")) == ["yes", "yes"]

    def test_parquet_in_batches(self, tmp_path):
        texts = [f"text {i}" for i in range(500)]
        assert list(documents(str(write_parquet(tmp_path / "a.parquet", text=texts)))) == texts

    def test_folder(self, tmp_path):
        (tmp_path / "b" / ".hidden").mkdir(parents=True)
        (tmp_path / "b" / "1.TXT").write_text("b1")
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "notes.md").write_text("no")
        (tmp_path / ".c.txt").write_text("no")
        (tmp_path / "b" / ".hidden" / "d.txt").write_text("no")
        write_jsonl(tmp_path / "c.jsonl", {"text": "c"})
        assert list(documents(str(tmp_path))) == ["a", "b1", "c"]

    def test_a_colon_in_the_name(self, tmp_path):
        file = write_jsonl(tmp_path / "a:b.jsonl", {"text": "t", "body": "b"})
        assert list(documents(str(file))) == ["t"]
        assert list(documents(f"{file}:body")) == ["b"]
        (tmp_path / "x:y").mkdir()
        (tmp_path / "x:y" / "z.txt").write_text("z")
        assert list(documents(str(tmp_path / "x:y"))) == ["z"]

    def test_lone_surrogates_are_replaced(self, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}')
        assert list(documents(str(file))) == ["a\ufffd b \U0001f600"]

    def test_is_local(self, tmp_path):
        (tmp_path / "a:b.txt").write_text("a")
        assert is_local("builtin")
        assert is_local("builtin:heldout")
        assert is_local(str(tmp_path))
        assert is_local(str(tmp_path / "a:b.txt"))
        assert not any(
            map(is_local, ("c4", "c4:validation", "hub:a/b", f"hub:{tmp_path}", "absent.txt", "builtin:x", ""))
        )


class TestBadInput:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("", "no such file or folder"),
            ("  ", "no such file or folder"),
            ("wikitxt2", "no such file or folder.*hub:NAME.*wikitext2"),
            ("absent.jsonl:text", "no such file or folder"),
            ("x" * 5000, "no such file or folder"),
            ("a\0b", "no such file or folder"),
            ("/dev/null", "neither a file nor a folder"),
            ("{dir}/a.csv", r"ends in \.csv; expected text .*, \.jsonl or \.parquet\. Rename or convert"),
            ("{dir}/plain", "ends in no suffix"),
            ("{dir}/a.jsonl:", "field '' was asked for"),
            ("{dir}/a.txt:body", "field 'body' was asked for. Only .jsonl and .parquet files have fields"),
        ],
    )
    def test_specs(self, tmp_path, spec, message):
        for name in ("a.csv", "plain", "a.jsonl", "a.txt"):
            (tmp_path / name).write_text("x")
        with pytest.raises(UsageError, match=message) as caught:
            check_spec(spec.replace("{dir}", str(tmp_path)))
        assert len(str(caught.value)) < 1200

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"text": "a"}\n{"text": ', r"line 2: not JSON in UTF-8 \(Expecting value.*one JSON object a line"),
            (b'{"text": "\xff"}', r"line 1: not JSON in UTF-8 \('utf-8' codec"),
            ('{"text": "a"}'.encode("utf-16"), "line 1: not JSON in UTF-8"),
            (b"[1, 2]\n", "line 1: found a value of type list; expected a JSON object"),
            (b"null\n", r"line 1: null; expected text"),
            (
                b'{"body": "a", "n": 1}\n',
                r"line 1: there is no field 'text'; found body, n\. Name the field.*file.jsonl:FIELD",
            ),
            (b"{}\n", "there is no field 'text'; found none"),
            (b'{"text": null}\n', r"line 1: field 'text' holds nothing \(null\); expected text"),
            (b'{"text": 5}\n', "holds a value of type int"),
            (b'{"text": ["a"]}\n', "holds a value of type list"),
            (b'{"text": [{"role": "user", "content": 7}]}\n', "field 'text': a message holds a value of type int"),
            (b'{"text": ' + b"9" * 5000 + b"}\n", "line 1: not JSON in UTF-8"),
            (b'{"text": ' + b"[" * 1_000_000 + b"\n", "line 1: nested too deeply"),
            (b'{"a":' * 200_000 + b"\n", "line 1: nested too deeply"),
        ],
    )
    def test_jsonl(self, tmp_path, content, message):
        file = tmp_path / "a.jsonl"
        file.write_bytes(content)
        with pytest.raises(CorpusError, match=message) as caught:
            list(documents(str(file)))
        assert str(file) in str(caught.value)
        assert len(str(caught.value)) < 1000

    def test_a_line_of_100_megabytes_is_refused_unread(self, tmp_path):
        file = tmp_path / "a.jsonl"
        with file.open("wb") as stream:
            stream.write(b'{"text": "')
            stream.truncate(100 << 20)
        tracemalloc.start()
        try:
            with pytest.raises(CorpusError, match="line 1: longer than 16 MiB"):
                list(documents(str(file)))
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()

    def test_txt_that_is_not_utf8(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"gr\xfc\xdfe")
        with pytest.raises(CorpusError, match=r"a\.txt: not UTF-8 text .*iconv"):
            list(documents(str(tmp_path / "a.txt")))

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"not parquet at all"])
    def test_broken_parquet(self, tmp_path, content):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(CorpusError, match="not a readable parquet file"):
            list(documents(str(tmp_path / "a.parquet")))

    def test_damaged_parquet(self, tmp_path):
        whole = write_parquet(tmp_path / "a.parquet", text=[f"some text {i}" for i in range(200)]).read_bytes()
        rng = random.Random(3)
        for _ in range(100):
            damaged = bytearray(whole)
            for _ in range(3):
                damaged[rng.randrange(4, len(whole) // 2)] ^= 1 << rng.randrange(8)
            (tmp_path / "b.parquet").write_bytes(damaged)
            with contextlib.suppress(CorpusError):
                list(documents(str(tmp_path / "b.parquet")))

    def test_parquet_without_the_field(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", body=["x"], n=[1])
        with pytest.raises(CorpusError, match="no field 'text'; found body, n"):
            list(documents(str(file)))
        with pytest.raises(CorpusError, match="field 'n' holds a value of type int"):
            list(documents(f"{file}:n"))

    def test_folder_without_text(self, tmp_path):
        (tmp_path / "a.png").write_text("x")
        with pytest.raises(CorpusError, match=r"holds no text \(\.txt, \.md, \.py and other source code\), \.jsonl or"):
            list(documents(str(tmp_path)))

    def test_source_code_is_text(self, tmp_path):
        (tmp_path / "src").mkdir()
        (tmp_path / ".git").mkdir()
        for name in ("README.md", "src/a.py", "src/b.RS", "requirements.txt", "src/c.pyc", "picture.png", ".git/d.py"):
            (tmp_path / name).write_text(name)
        assert list(documents(str(tmp_path))) == ["README.md", "requirements.txt", "src/a.py", "src/b.RS"]
        assert list(documents(str(tmp_path / "src" / "a.py"))) == ["src/a.py"]
        with pytest.raises(UsageError, match="field 'body' was asked for"):
            check_spec(f"{tmp_path / 'src' / 'a.py'}:body")

    def test_beside_rows_of_data_other_text_describes_them(self, tmp_path):
        write_jsonl(tmp_path / "a.jsonl", {"text": "row"})
        for name in ("README.md", "load.py", "b.txt"):
            (tmp_path / name).write_text(name)
        assert list(documents(str(tmp_path))) == ["row", "b.txt"]

    def test_unreadable_file(self, tmp_path, monkeypatch):
        file = tmp_path / "a.txt"
        file.write_text("x")
        reading = documents(str(file))
        file.unlink()
        with pytest.raises(CorpusError, match="cannot be read"):
            list(reading)


class TestFuzz:
    def test_jsonl_lines(self, tmp_path):
        good = b'{"text": "some w\\u00f6rds", "n": [1, {"a": null}], "messages": [{"role": "u", "content": "hi"}]}'
        rng = random.Random(1)
        file = tmp_path / "a.jsonl"
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
        outcomes: Counter[str] = Counter()
        for _ in range(2500):
            line = bytearray(good)
            for _ in range(rng.randrange(4)):
                place = rng.randrange(len(line))
                action = rng.randrange(4)
                if action == 0:
                    line[place] = rng.randrange(256)
                elif action == 1:
                    del line[place : place + rng.randrange(1, 12)]
                elif action == 2:
                    line[place:place] = rng.choice(
                        [b"\\ud800", b"\n", b"\r", b"[" * 50, b"NaN", b'"', b"{", b"\xff", b"\0", b"1e999"]
                    )
                else:
                    line[place:place] = bytes(rng.choices(range(256), k=5))
                line = line or bytearray(b" ")
            content = bytes(line) * rng.randrange(1, 3)
            os.pwrite(descriptor, content.ljust(1000, b"\n"), 0)  # much faster than a new file; blank lines are skipped
            try:
                texts = list(documents(f"{file}:{rng.choice(['text', 'messages', 'n'])}"))
                assert all(isinstance(text, str) and text.encode() is not None for text in texts)
                outcomes["read"] += 1
            except CorpusError as error:
                assert len(str(error)) < 2000
                outcomes["error"] += 1
        os.close(descriptor)
        assert min(outcomes["read"], outcomes["error"]) > 100, outcomes
