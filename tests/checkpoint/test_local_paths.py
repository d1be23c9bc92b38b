"""No path of this machine in what is published; what later commands need of it stays in the user's cache."""

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
    base_model_here,
    data_here,
    published,
    published_command,
    published_facts,
    remember,
    without_paths,
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


def test_configs_lose_paths_at_every_level():
    config = {
        "name_or_path": "/home/a/model",
        "vocab_file": "vocab.json",
        "tokenizer_file": "/home/a/model/tokenizer.json",
        "text_config": {"_name_or_path": "../model", "hidden_size": 8, "rope": {"_name_or_path": "USER/NAME"}},
        "file_of_nothing": "/kept",
    }
    assert without_paths(config) == {
        "vocab_file": "vocab.json",
        "text_config": {"hidden_size": 8, "rope": {"_name_or_path": "USER/NAME"}},
        "file_of_nothing": "/kept",
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WINA_CALIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_that_tell(folder: Path, secret: str) -> list[str]:
    return [p.name for p in folder.rglob("*") if secret.encode() in p.read_bytes()]


@pytest.mark.parametrize("weights", ["full", "reference"])
def test_no_file_of_a_checkpoint_tells_where_model_and_text_were(tmp_path: Path, cache: Path, weights: str):
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
    options = {"samples": 64, "seq_len": 128, "budget": "uniform", "transform": "none", "grid": (0.5,)}
    wina_calib.calibrate(model, out, data=str(text), weights=weights, **options)
    save_evaluation(out, evaluate(out, data=str(text), tokens=512).to_dict())
    if weights == "full":
        prepare(out, "me/out")
    assert files_that_tell(out, "secret") == []
    settings = read_settings(out)
    facts = settings.provenance
    assert (facts["base_model"], facts["data"]) == ("model", [text.name])
    out.rename(tmp_path / "moved")
    assert data_here(facts) == (str(text),)
    assert base_model_here(settings.weights, "model") == model
    shutil.rmtree(cache)
    assert data_here(facts) == (text.name,)
    assert base_model_here(settings.weights, "model") is None


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"about": 1, "places": ["/x"]}', None])
def test_a_damaged_record_of_places_counts_for_nothing(cache: Path, tmp_path: Path, damage: bytes | None):
    facts = {"base_model": "model", "data": ["a.txt"], "data_fingerprint": "f"}
    remember("w", facts, base_model=tmp_path, data=[str(tmp_path / "a.txt")])
    assert (base_model_here("w", "model"), data_here(facts)) == (tmp_path, (str(tmp_path / "a.txt"),))
    for file in cache.glob("*/place-*"):
        if damage is None:
            file.chmod(0o666)  # others may have written it
        else:
            file.write_bytes(damage)
    assert (base_model_here("w", "model"), data_here(facts)) == (None, ("a.txt",))


def test_of_several_places_of_one_base_model_the_last_that_is_there_counts(cache: Path, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        remember("w", {"base_model": "model"}, base_model=tmp_path / name / "model")
    assert base_model_here("w", "model") == tmp_path / "b" / "model"
    shutil.rmtree(tmp_path / "b")
    assert base_model_here("w", "model") == tmp_path / "a" / "model"


def test_without_a_cache_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WINA_CALIB_CACHE", str(tmp_path / "file" / "cache"))
    facts = {"base_model": "model", "data": ["a.txt"]}
    remember("w", facts, base_model=tmp_path, data=[str(tmp_path / "a.txt")])
    assert (base_model_here("w", "model"), data_here(facts)) == (None, ("a.txt",))


def test_the_licence_of_a_local_base_model_is_found_and_one_of_the_same_name_is_not(
    calibrated: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(shutil.copytree(calibrated, tmp_path / "sparse"))
    for place, licence in (("model", "mit"), ("here/model", "apache-2.0")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    monkeypatch.chdir(tmp_path / "here")
    settings = read_settings(folder)
    remember(settings.weights, settings.provenance, base_model=tmp_path / "model")
    for kept, expected in ((True, True), (False, False)):
        (folder / "README.md").unlink()
        if not kept:
            shutil.rmtree(cache)
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
