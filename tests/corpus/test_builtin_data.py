"""The built-in corpus and the catalogue: what ships is complete, clean, mixed and split without overlap."""

import json
import re
import string
from collections import Counter
from pathlib import Path

import pytest

from wina_calib.corpus import rows, sources
from wina_calib.corpus.blocks import text_hashes
from wina_calib.corpus.sources import catalogue, check_spec, documents
from wina_calib.errors import CorpusError, UsageError

DATA = Path(__file__).parents[2] / "calibration_data"
BUILTIN = [json.loads(line) for line in (DATA / "corpus.jsonl").read_text("utf-8").splitlines()]


class TestBuiltin:
    def test_size_and_variety(self):
        assert len(BUILTIN) >= 150
        assert sum(len(d["text"].encode()) for d in BUILTIN) >= 600_000
        assert all(set(d) == {"text", "kind", "language", "split"} for d in BUILTIN)
        assert {d["kind"] for d in BUILTIN} == {
            "code", "dialogue", "encyclopaedic", "essay", "fiction", "instruction", "legal", "mathematics", "news",
            "tables", "technical",
        }  # fmt: skip
        assert len({d["language"] for d in BUILTIN if d["kind"] == "code"}) >= 5
        assert len({d["language"] for d in BUILTIN if d["kind"] != "code"}) >= 5

    def test_a_fifth_of_the_documents_of_every_kind_is_held_out(self):
        held = [d for d in BUILTIN if d["split"] == "heldout"]
        assert len(held) + sum(d["split"] == "calibration" for d in BUILTIN) == len(BUILTIN)
        assert abs(len(held) / len(BUILTIN) - 0.2) < 0.02
        kinds = Counter(d["kind"] for d in BUILTIN)
        for kind, count in Counter(d["kind"] for d in held).items():
            assert abs(count - 0.2 * kinds[kind]) < 1.5, kind
        assert set(kinds) == {d["kind"] for d in held}
        assert {d["language"] for d in held} <= {d["language"] for d in BUILTIN if d["split"] == "calibration"}

    def test_every_prefix_is_mixed(self):
        kinds = Counter(d["kind"] for d in BUILTIN)
        for length in (30, 60, 120):
            found = Counter(d["kind"] for d in BUILTIN[:length])
            for kind, count in kinds.items():
                assert abs(found[kind] - count * length / len(BUILTIN)) < 1.5, (kind, length)

    def test_no_long_line_is_in_two_documents(self):
        owners: dict[str, int] = {}
        for index, document in enumerate(BUILTIN):
            for line in document["text"].splitlines():
                normal = re.sub(r"\d", "0", re.sub(r"\W+", " ", line.lower())).strip()
                if len(normal) > 60:
                    assert owners.setdefault(normal, index) == index, line

    def test_held_out_text_does_not_overlap(self):
        assert not text_hashes(["builtin"]) & text_hashes(["builtin:heldout"])

    def test_nothing_private_or_left_over(self):
        for document in BUILTIN:
            text = document["text"]
            assert "=====DOC" not in text
            assert "\ufffd" not in text
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
            for mail in re.findall(r"[\w.+-]+@[\w-]+\.[\w.]+", text):
                assert re.search(r"(^|[@.])example\.(org|com|net)\.?$|\.(example|test|invalid)\.?$", mail), mail
            for host in re.findall(r"https?://([\w.-]+)|\b(www\.[\w.-]+)", text):
                assert re.search(
                    r"(^|\.)example\.(org|com|net)\.?$|\.(example|test|invalid)$|^[^.]+$", "".join(host)
                ), host

    def test_python_documents_compile(self):
        found = [d["text"] for d in BUILTIN if d["language"] == "python"]
        assert found
        for text in found:
            compile(text, "document", "exec")

    def test_specs(self):
        assert list(documents("builtin")) == [d["text"] for d in BUILTIN if d["split"] == "calibration"]
        assert list(documents("builtin:calibration")) == list(documents("builtin"))
        assert list(documents("builtin:heldout")) == [d["text"] for d in BUILTIN if d["split"] == "heldout"]
        with pytest.raises(UsageError, match="builtin:heldout"):
            check_spec("builtin:train")
        code = [d["text"] for d in BUILTIN if d["split"] == "calibration" and d["kind"] == "code"]
        assert list(documents("builtin:code")) == list(documents("builtin:calibration:code")) == code
        assert set(documents("builtin:heldout:essay")) < set(documents("builtin:heldout"))
        with pytest.raises(UsageError, match="essay, fiction"):
            check_spec("builtin:heldout:poem")

    def test_the_data_card_counts_what_is_there(self):
        card = (DATA / "README.md").read_text("utf-8")
        for key in ("kind", "language"):
            for name, count in Counter(d[key] for d in BUILTIN).items():
                size = sum(len(d["text"].encode()) for d in BUILTIN if d[key] == name)
                held = sum(d["split"] == "heldout" for d in BUILTIN if d[key] == name)
                assert re.search(rf"\| {re.escape(name)} \| {count} \| {held} \| {size:,} \|", card), name
        for name, entry in catalogue().items():
            assert f"| {name} | {entry['path']} |" in card

    def test_missing_package_data_is_our_error(self, monkeypatch):
        monkeypatch.setattr(sources, "__file__", "/nowhere/wina_calib/corpus/sources.py")
        with pytest.raises(CorpusError, match="Install it again"):
            sources._data_file("nothing.jsonl")


class TestCatalogue:
    def test_entries(self):
        assert len(catalogue()) >= 18
        assert {"wikitext2", "c4", "fineweb-edu", "alpaca", "dolly", "ultrachat"} <= set(catalogue())
        required = {"path", "config", "split", "licence", "description"}
        for name, entry in catalogue().items():
            assert re.fullmatch(r"[a-z0-9-]+", name)
            assert required < set(entry) <= required | {"column", "template", "document_start"}, name
            assert ("column" in entry) != ("template" in entry), name
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry["path"])
            assert entry["config"] is None or isinstance(entry["config"], str)
            assert all(isinstance(entry[key], str) and entry[key] for key in ("split", "licence", "description"))
            assert "\n" not in entry["description"]

    def test_templates_format(self):
        for entry in catalogue().values():
            if "template" in entry:
                fields = [field for _, field, _, _ in string.Formatter().parse(entry["template"]) if field is not None]
                assert fields
                row = {field: f"[{field}]" for field in fields}
                assert rows.row_text(row, entry, "row 1") == "\n\n".join(row.values())

    def test_an_empty_field_leaves_no_gap(self):
        entry = {"template": "{a}\n\n{b}\n\n{c}"}
        assert rows.row_text({"a": "x", "b": "", "c": "y"}, entry, "row 1") == "x\n\ny"

    def test_wikitext_lines_become_documents(self):
        pattern = catalogue()["wikitext2"]["document_start"]
        rows = [
            "",
            " = One = \n",
            "",
            " text a \n",
            " = = Part = = \n",
            " text b \n",
            " = Two ( of 2 ) = \n",
            " text c \n",
        ]
        assert list(sources._joined(rows, pattern)) == [
            " = One = \n text a \n = = Part = = \n text b \n",
            " = Two ( of 2 ) = \n text c \n",
        ]

    def test_joined_documents_are_bounded(self):
        found = list(sources._joined(["x" * 100_000] * 9, "never"))
        assert "".join(found) == "x" * 900_000
        assert max(map(len, found)) <= sources._JOINED + 100_000
