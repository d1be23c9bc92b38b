"""The filter before the terminal: nothing that steers it passes, what people read does, and JSON keeps its meaning."""

import io
import json
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wina_calib.common.printable import (
    MAX_LINE,
    PrintableStream,
    one_line,
    printable,
    printable_json,
    printable_output,
    unfiltered,
)

STEERING = [
    "\x1b[31m",
    "\x00",
    "\x07",
    "\x08",
    "\r",
    "\x7f",
    "\x9b2J",
    "\x85",
    "\u202e",
    "\u2066",
    "\u200b",
    "\u2028",
    "\ufeff",
]
READABLE = ["tab\there", "two\nlines", "Grüße", "日本語", "👩\u200d👩\u200d👧", "می\u200cخواهم", "█▌ 50 %", "~`|{}"]


@pytest.mark.parametrize("mark", STEERING)
def test_what_steers_is_spelled_out(mark: str):
    found = printable(f"a{mark}b")
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Zl") for c in found)
    assert found.startswith("a\\")
    assert found.endswith("b")


@pytest.mark.parametrize("text", READABLE)
def test_what_people_read_stays(text: str):
    assert printable(text) == text


def test_a_joiner_in_plain_letters_is_a_disguise():
    assert printable("ad\u200dmin") == "ad\\u200dmin"


def test_bytes_of_a_name_that_is_no_utf8_are_shown_as_bytes():
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\\xe9"
    assert printable("\ud800") == "\\ud800"


def test_lines_are_limited_and_say_how_long_they_were():
    found = printable("short\n" + "a" * 100_000, MAX_LINE)
    assert found.startswith("short\naaaa")
    assert found.endswith("... (100,000 characters)")
    assert len(found) < MAX_LINE + 100
    assert one_line("a\nb\tc") == "a\\nb\\tc"


@given(st.text(st.characters()))
def test_any_text_comes_out_harmless_and_twice_is_once(text: str):
    found = printable(text)
    assert not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in found.replace("\n", "").replace("\t", "")
    )
    found.encode("utf-8")
    assert printable(found) == found


@given(
    st.recursive(
        st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_means_the_same(value: object):
    text = json.dumps(value, ensure_ascii=False)
    found = printable_json(text)
    assert json.loads(found) == value
    assert printable(found) == found


def test_a_stream_filters_texts_and_lets_bars_move():
    below = io.StringIO()
    stream = PrintableStream(below, limit=20)
    stream.write("\rbar: 10\x1b[31m%")
    stream.write("\x1b[A")
    stream.write("\n\n\x1b[A")
    stream.write("x" * 50)
    assert below.getvalue() == "\rbar: 10\\x1b[31m%\x1b[A\n\n\x1b[A" + "x" * 20 + "... (50 characters)"


def test_a_stream_of_few_characters_gets_those_that_it_has():
    below = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    PrintableStream(below).write("Grüße \x1b[1m\n")
    assert below.buffer.getvalue() == b"Gr\\xfc\\xdfe \\x1b[1m\n"


def test_both_outputs_are_filtered_inside_of_the_context_only(capsys: pytest.CaptureFixture[str]):
    before = sys.stdout, sys.stderr
    with printable_output():
        sys.stdout.write("\x1b[1mresult\n")
        sys.stderr.write("\x1b[1merror" + "e" * 9000)
        unfiltered(sys.stdout).write("\x1b[1mours\n")
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert out == "\\x1b[1mresult\n\x1b[1mours\n"
    assert err.startswith("\\x1b[1merror")
    assert len(err) < MAX_LINE + 100


def test_a_traceback_that_leaves_the_context_is_filtered_too():
    program = (
        "from wina_calib.common.printable import printable_output\n"
        "with printable_output():\n    raise ValueError('\\x1b[31mred ' + 'a' * 100_000)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"_WINA_CALIB_COMPLETE": "1"} | {"PYTHONPATH": ":".join(sys.path)},
    )
    assert run.returncode == 1
    assert "\\x1b[31mred" in run.stderr
    assert "\x1b" not in run.stderr
    assert len(run.stderr) < 4000
