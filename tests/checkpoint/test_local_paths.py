"""No path of this machine in what is published; what later commands need of it stays in a file that is not pushed."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

import wina_calib
from wina_calib.checkpoint.card import write_card
from wina_calib.checkpoint.evaluation_file import save_evaluation
from wina_calib.checkpoint.hub import prepare
from wina_calib.checkpoint.local_paths import (
    LOCAL_FILE,
    data_here,
    published,
    published_command,
    published_facts,
    remember,
)
from wina_calib.checkpoint.reader import read_settings
from wina_calib.studies.evaluate import evaluate

PUBLISHED = {
    "/home/a/model": "model",
    "/home/a/model/": "model",
    "~/texts/a.jsonl:field": "a.jsonl:field",
    "./x/y.txt": "y.txt",
    "../../x": "x",
    "a/b/c": "c",
    "USER/NAME": "USER/NAME",
    "demo": "demo",
    "text.txt": "text.txt",
    "builtin:heldout:fiction": "builtin:heldout:fiction",
    "hub:allenai/c4:en": "hub:allenai/c4:en",
    "hub:/home/a/set": "hub:set",
    "wikitext2:test": "wikitext2:test",
    "--data=/home/a/x y/t.txt": "--data=t.txt",
    "--sparsity=0.5": "--sparsity=0.5",
    "C:\\Users\\a\\model": "model",
    "/home/a b/c d": "c d",
    "/a/\x1b[31mred": "\\x1b[31mred",
    b"/a/caf\xe9".decode("utf-8", "surrogateescape"): "caf\\xe9",
    "https://x/y/z": "https://x/y/z",
}


@pytest.mark.parametrize(("text", "expected"), PUBLISHED.items())
def test_of_a_path_the_last_part_is_published(text: str, expected: str):
    assert published(text) == expected
    assert published(expected) == expected


def test_a_folder_named_like_a_repository_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert published("secret/model") == "secret/model"
    (tmp_path / "secret" / "model").mkdir(parents=True)
    assert published("secret/model") == "model"
    assert published(".") == tmp_path.name


def test_a_command_is_published_argument_by_argument():
    command = [
        "wina-calib",
        "calibrate",
        "/home/a b/my model",
        "-o",
        "../out",
        "--data",
        "./x/y.txt",
        "--data=/q/z.txt",
    ]
    assert published_command(command) == "wina-calib calibrate 'my model' -o out --data y.txt --data=z.txt"
    facts = {
        "command": "wina-calib calibrate /home/a/model -o out",
        "data": ["/t/x.txt", "builtin"],
        "base_model": "/home/a/model",
    }
    assert published_facts(facts) == {
        "command": "wina-calib calibrate model -o out",
        "data": ["x.txt", "builtin"],
        "base_model": "model",
    }
    assert published_facts(published_facts(facts)) == published_facts(facts)


def files_that_tell(folder: Path, secret: str) -> list[str]:
    return [p.name for p in folder.iterdir() if not p.name.startswith(".") and secret.encode() in p.read_bytes()]


def test_nothing_that_is_pushed_tells_where_model_and_text_were(tmp_path: Path):
    secret = tmp_path / "secret"
    model = secret / "model"
    secret.mkdir()
    tiny.save("llama", model)
    text = tiny.text_file(secret)
    for name in ("config.json", "tokenizer_config.json"):
        path = model / name
        key = "_name_or_path" if name == "config.json" else "name_or_path"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: str(secret / "model")}))
    out = tmp_path / "out"
    wina_calib.calibrate(
        model, out, data=str(text), samples=64, seq_len=128, budget="uniform", transform="none", grid=(0.5,)
    )
    save_evaluation(out, evaluate(out, data=str(text), tokens=512).to_dict())
    prepare(out, "me/out")
    assert files_that_tell(out, "secret") == []
    facts = read_settings(out).provenance
    assert (facts["base_model"], facts["data"]) == ("model", [text.name])
    assert data_here(out, facts) == (str(text),)
    (out / LOCAL_FILE).unlink()
    assert data_here(out, facts) == (text.name,)


def test_the_licence_of_a_local_base_model_is_found_and_one_of_the_same_name_is_not(
    calibrated: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(shutil.copytree(calibrated, tmp_path / "sparse"))
    for place, licence in (("model", "mit"), ("here/model", "apache-2.0")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    monkeypatch.chdir(tmp_path / "here")
    remember(folder, base_model=tmp_path / "model", data=())
    for kept, expected in ((True, True), (False, False)):
        (folder / "README.md").unlink()
        if not kept:
            (folder / LOCAL_FILE).unlink()
        write_card(folder)
        assert ("license: mit" in (folder / "README.md").read_text()) is expected
        assert "apache-2.0" not in (folder / "README.md").read_text()


def test_a_checkpoint_of_an_earlier_version_is_pushed_without_its_paths(calibrated: Path, tmp_path: Path):
    folder = Path(shutil.copytree(calibrated, tmp_path / "sparse"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["provenance"] |= {"base_model": "/secret/model", "data": ["/secret/text.txt"]}
    (folder / "config.json").write_text(json.dumps(config))
    prepare(folder, "me/sparse")
    assert files_that_tell(folder, "secret") == []
