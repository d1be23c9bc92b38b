"""Metadata of model cards: of others only short sound facts come through, soon, whatever they hold; one's own stays whole."""

import random
import shutil
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from wina_calib.checkpoint.card_metadata import CARD, facts_of_base, head, sound_facts, split_card
from wina_calib.cli import main
from wina_calib.errors import CheckpointError

MERGES = "\n".join(["a0: &a0 {k: v}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 27))])
HOSTILE = {
    "merges": MERGES,
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "own merge": "<<: &x {license: mit}\nlicense: mit",
    "impossible date": "date: 2024-02-31",
    "impossible time": "date: 2024-01-01 99:99:99",
    "5,000 digits": f"serial: {'9' * 5000}",
    "hexadecimal of 20,000 digits": f"serial: 0x{'f' * 20_000}",
    "base 60": f"serial: 1{':59' * 5000}",
    "2 MB list": "a:\n" + "- b\n" * (1 << 19),
    "2 MB of short keys": "\n".join(f"k{i}: v" for i in range(1 << 18)),
    "deep flow": "a: " + "[" * 100_000,
    "deep block": "\n".join(" " * i + "a:" for i in range(3000)),
    "tag": "a: !!python/object/apply:os.system [id]",
    "float of the wrong kind": "a: !!float x",
    "set": "a: !!set {x}",
    "two documents": "a: 1\n--- \nb: 2",
    "no mapping": "- license: mit",
    "list as key": "? [a]\n: b",
    "control characters": "license: \x1b[31m",
    "no UTF-8": "license: \udcff",
    "not closed": "license: 'mit",
}


def base(folder: Path, block: str) -> Path:
    (folder / CARD).write_bytes(f"---\nlicense: mit\n{block}\n---\nA model.\n".encode("utf-8", "surrogateescape"))
    return folder


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_base_models_card_never_raises_and_never_takes_long(kind: str, tmp_path: Path):
    base(tmp_path, HOSTILE[kind])
    start = time.process_time()
    found = facts_of_base(tmp_path)
    assert time.process_time() - start < 1
    assert len(repr(found)) < 300
    assert found in ({}, {"license": "mit"})
    if kind in ("merges", "aliases", "own merge", "tag", "2 MB list", "not closed"):
        assert found == {}


@pytest.mark.parametrize("kind", HOSTILE)
def test_ones_own_card_is_named_or_can_be_written_again(kind: str, tmp_path: Path):
    base(tmp_path, HOSTILE[kind])
    start = time.process_time()
    try:
        metadata, text = split_card(tmp_path / CARD)
    except CheckpointError as error:
        assert "README.md" in str(error)
        assert len(str(error)) < 600
    else:
        assert text.endswith("A model.\n")
        assert yaml.safe_load(head(metadata)) == metadata
    assert time.process_time() - start < 8


def test_facts_of_others_are_taken_as_they_stand(tmp_path: Path):
    base(tmp_path, "license_name: My terms\nlicense_link: LICENSE.txt\nlanguage: [no, en, zh-Hans]\ndate: 2024-02-31")
    assert facts_of_base(tmp_path) == {
        "license": "mit", "license_name": "My terms", "license_link": "LICENSE.txt", "language": ["no", "en", "zh-Hans"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("license", "a" * 200), ("license", "x\ny"), ("license", 5), ("license", ["mit"]), ("license", None), ("license", "~"),
        ("license_name", "a\u202eb"), ("license_link", "javascript:alert(1)"), ("license_link", "../../etc/passwd"),
        ("license_link", "/etc/passwd"), ("license_link", "a/../b"), ("license_link", "https://x/a b"),
        ("language", {"en": 1}), ("language", "e" * 50), ("language", ["\x1b", 5, None]),
    ],
)  # fmt: skip
def test_facts_that_are_none_are_left_out(name: str, value: object):
    assert sound_facts({name: value}) == {}


def test_a_link_that_leaves_the_base_models_folder_is_not_read(tmp_path: Path):
    folder, outside = tmp_path / "model", tmp_path / "letter"
    folder.mkdir()
    outside.write_text("---\nlicense: mine\n---\n")
    (folder / CARD).symlink_to(outside)
    assert facts_of_base(folder) == {}
    assert facts_of_base(tmp_path / "nowhere") == {}


def test_any_damage_to_a_card_is_only_ours(tmp_path: Path):
    rng = random.Random(3)
    whole = (
        "---\nlicense: mit\nlanguage:\n- en\n- de\ntags: [a, b]\nmodel-index:\n- results: [{value: 1.5}]\n---\nText.\n"
    )
    pieces = [
        "&a ",
        "*a",
        "<<: ",
        "!!x ",
        "{",
        "[",
        "]",
        "}",
        "\n",
        "---\n",
        "9" * 5000,
        "0x",
        "2024-13-45",
        ": ",
        "- ",
        "\x00",
        "\t",
        "'",
    ]
    for _ in range(300):
        text = whole
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(pieces) + text[at + rng.randint(0, 5) :]
        (tmp_path / CARD).write_text(text)
        facts_of_base(tmp_path)
        try:
            metadata, _ = split_card(tmp_path / CARD)
        except CheckpointError:
            continue
        head(metadata)


def test_a_card_that_cannot_be_read_is_said_before_an_evaluation(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(shutil.copytree(calibrated, tmp_path / "sparse"))
    base(folder, HOSTILE["merges"])
    monkeypatch.setattr(
        "wina_calib.studies.evaluate.evaluate", lambda *args, **options: pytest.fail("it was evaluated")
    )
    done = CliRunner().invoke(main, ["evaluate", str(folder), "--save"])
    assert done.exit_code == 1
    assert "README.md: the metadata between the --- lines is no plain YAML (line 2: anchors" in done.stderr
