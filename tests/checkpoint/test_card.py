"""The model card: facts, metadata that the Hub takes, and what people wrote into it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from wina_calib.calibration import held_out
from wina_calib.checkpoint.card import hub_datasets, write_card
from wina_calib.checkpoint.card_text import _loading
from wina_calib.checkpoint.evaluation_file import read_evaluation, save_evaluation
from wina_calib.checkpoint.export_dense import export_dense
from wina_calib.checkpoint.format import EVALUATION_FILE, HEAT_MAP
from wina_calib.checkpoint.hub import prepare
from wina_calib.checkpoint.reader import read_settings
from wina_calib.commands.evaluate import render
from wina_calib.common import plots
from wina_calib.errors import CheckpointError
from wina_calib.studies.evaluate import evaluate


@pytest.fixture
def folder(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "sparse"))


def provenance(folder: Path, **values: object) -> None:
    """Change what config.json says of the calibration's origin."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["provenance"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def test_calibrate_leaves_a_card_that_huggingface_hub_reads(calibrated: Path) -> None:
    card = ModelCard.load(calibrated / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["wina", "activation-sparsity", "arxiv:2505.19427"]
    assert card.data.base_model is None  # a local folder is no repository
    assert card.text.startswith(f"# {calibrated.name}\n")
    for heading in ("Load it", "Figures", "Budget", "How it was made", "Limits"):
        assert f"\n## {heading}\n" in card.text


def test_a_sparsity_that_a_target_gave_is_told_in_few_digits(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sparsity"] = 0.27881234567
    (folder / "config.json").write_text(json.dumps(config))
    write_card(folder)
    card = (folder / "README.md").read_text()
    assert "wina_calib.set_sparsity(model, 0.2788)" in card and "27.9 % of them by default" in card
    assert "0.27881" not in card


def test_every_fact_of_the_calibration_is_told(calibrated: Path) -> None:
    settings, card = read_settings(calibrated), (calibrated / "README.md").read_text()
    facts = settings.provenance
    assert "| transform | none, 0 run-time weights |" in card
    assert "budget chosen later" not in card
    assert "| sparsity asked | 50.0 % |" in card
    assert f"| command | `{facts['command']}` |" in card
    assert f"| weights | sha256 `{settings.weights}` |" in card
    assert f"sha256 `{facts['data_fingerprint']}` |" in card
    assert "| tokens | 80 blocks of 128, seed 0 |" in card
    assert set(facts["versions"]) >= {"wina_calib", "torch", "transformers"}
    for name, version in facts["versions"].items():
        assert f"`{name} {version}`" in card
    layers = re.findall(r"^\| (\d+) \| 0\.500 \| 0\.500 \| 0\.500 \| 0\.500 \|$", card, flags=re.M)
    assert layers == ["0", "1", "2"]


def test_no_local_folder_is_told(calibrated: Path, text: Path, llama: Path) -> None:
    card = (calibrated / "README.md").read_text()
    assert text.name in card
    assert str(text.parent) not in card
    assert str(llama.parent) not in card


def test_the_example_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    write_card(folder)
    text = (folder / "README.md").read_text()
    example = text.partition("```python\n")[2].partition("```")[0]
    assert len(example.splitlines()) == 3
    scope: dict[str, object] = {}
    exec(example, scope)
    assert type(scope["model"]).__name__ == "LlamaForCausalLM"


def test_where_only_wina_calib_knows_the_model_type_the_card_says_so(folder: Path) -> None:
    settings = read_settings(folder)
    assert "knows the model type" not in _loading(folder, settings, "me/x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": f"wina_calib-{config['model_type']}"}))
    assert "no transformers knows the model type `wina_calib-llama`." in _loading(folder, settings, "me/x")


def test_metadata_of_a_base_model_on_the_hub(folder: Path) -> None:
    provenance(folder, base_model="org/base", base_commit="a" * 40, data=["c4", "hub:user/texts:en", "builtin"])
    write_card(folder, repo="me/sparse")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.datasets == ["allenai/c4", "user/texts"]
    assert 'wina_calib.load("me/sparse")' in card.text
    assert "[org/base](https://huggingface.co/org/base)" in card.text


def test_licence_comes_from_the_base_folders_card(folder: Path, llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: de\n---\n"
    )
    (folder / "LICENSE").write_text("terms")
    provenance(folder, base_model=str(base))
    write_card(folder)
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name, data.license_link, data.language) == ("other", "mine", "LICENSE", "de")


def test_the_bundled_models_licence_is_known(folder: Path) -> None:
    provenance(folder, base_model="demo")
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.language, card.data.base_model) == ("apache-2.0", "en", None)
    assert "`demo-llama-5m` with calibrated activation sparsity" in card.text


def test_a_licence_file_alone_is_named(folder: Path) -> None:
    (folder / "LICENSE.txt").write_text("terms")
    write_card(folder)
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_link) == ("other", "LICENSE.txt")


def test_what_people_write_stays(folder: Path) -> None:
    path = folder / "README.md"
    text = path.read_text()
    text = text.replace("tags:\n", "license: mit\ntags:\n- mine\n").replace("# sparse", "# My own title\n\nAnd a word.")
    path.write_text(text + "\nThe end.\n")
    write_card(folder, repo="me/sparse")
    card = ModelCard.load(path)
    assert card.data.license == "mit"
    assert card.data.tags == ["wina", "activation-sparsity", "arxiv:2505.19427", "mine"]
    assert "# My own title\n\nAnd a word." in card.text
    assert card.text.rstrip().endswith("The end.")
    assert 'load("me/sparse")' in card.text
    once = path.read_bytes()
    write_card(folder, repo="me/sparse")
    assert path.read_bytes() == once


def test_a_card_without_marks_keeps_its_text(folder: Path) -> None:
    (folder / "README.md").write_text("# Theirs\n")
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.text.startswith("# Theirs\n")
    assert "## Figures" in card.text
    assert card.data.pipeline_tag == "text-generation"


@pytest.mark.parametrize("block", ["a: [", "- a list", "&a [*a, *a"])
def test_broken_metadata_is_named(folder: Path, block: str) -> None:
    (folder / "README.md").write_text(f"---\n{block}\n---\ntext\n")
    with pytest.raises(CheckpointError, match=r"README\.md: the metadata between"):
        write_card(folder)


def test_hostile_names_stay_text(folder: Path) -> None:
    provenance(folder, base_model="x`<script>|\n# y", data=["a`b|c"], command="`rm`\n---")
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert "\n# y" not in text
    assert "`rm`" not in text
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "transformers"


def test_hostile_facts_are_no_markup(folder: Path) -> None:
    names = {"base_model": "x](javascript:y)<script>", "base_commit": "abc<script>"}
    facts = dict.fromkeys(("blocks", "seq_len", "seed", "base_ppl_tokens", "rebudgeted"), "|<script>")
    provenance(folder, **names, **facts)
    write_card(folder)
    outside = re.sub("`[^`]*`", "", (folder / "README.md").read_text())
    assert "<script>" not in outside
    assert "javascript" not in outside


def test_measured_figures_are_shown_until_the_thresholds_change(folder: Path, text: Path) -> None:
    result = evaluate(folder, data=str(text), tokens=1024)
    save_evaluation(folder, result.to_dict())
    write_card(folder)
    card = (folder / "README.md").read_text()
    assert f"| perplexity dense | {result.dense_ppl:.3f} |" in card
    assert f"| read fraction | {100 * result.read_fraction:.1f} % with lm_head |" in card
    assert f"tokens of `{text.name}`" in card
    assert f"| perplexity sparse | {result.sparse_ppl:.3f} (" in card
    assert f"| sparsity achieved (asked 50.0 %) | {100 * result.model_sparsity:.1f} % |" in card
    assert "perplexity of the base model" not in card  # it is of other text
    wina_file = folder / "wina.safetensors"
    data = bytearray(wina_file.read_bytes())
    data[-4:] = b"\0\0\0\0"
    wina_file.write_bytes(data)
    assert read_evaluation(folder) is None
    write_card(folder)
    assert "not measured yet" in (folder / "README.md").read_text()


def test_the_base_models_perplexity_stands_beside_figures_of_the_same_tokens_only(folder: Path) -> None:
    for tokens, same in ((1024, False), (held_out.HELD_OUT_TOKENS, True)):
        result = evaluate(folder, tokens=tokens)
        save_evaluation(folder, result.to_dict())
        write_card(folder)
        assert result.base_ppl_comparable is same
        assert ("original model's perplexity" in render(result)) is same
        assert ("| perplexity of the base model |" in (folder / "README.md").read_text("utf-8")) is same
    assert result.dense_ppl == pytest.approx(result.base_ppl, rel=1e-4)


def test_a_damaged_evaluation_is_named(folder: Path) -> None:
    (folder / EVALUATION_FILE).write_text('{"format": "wina-evaluation/1"}')
    with pytest.raises(CheckpointError, match=r"wina_evaluation\.json is damaged"):
        write_card(folder)


def test_a_link_is_replaced_and_never_written_through(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("# cached\n")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(blob)
    write_card(folder)
    assert blob.read_text() == "# cached\n"
    assert not (folder / "README.md").is_symlink()


def test_the_heat_map_is_drawn_for_a_push_and_always_the_same(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    prepare(folder, "me/sparse")
    assert f"]({HEAT_MAP})" in (folder / "README.md").read_text()
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first[HEAT_MAP].startswith(b"\x89PNG")
    prepare(folder, "me/sparse")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_a_dense_model_takes_over_nothing_that_tells_of_the_sparse_one(folder: Path, tmp_path: Path) -> None:
    for name in (HEAT_MAP, EVALUATION_FILE):
        (folder / name).write_bytes(b"{}")
    (folder / "LICENSE").write_text("kept")
    export_dense(folder, tmp_path / "dense")
    assert not {path.name for path in (tmp_path / "dense").iterdir()} & {HEAT_MAP, EVALUATION_FILE}
    assert (tmp_path / "dense" / "LICENSE").read_text() == "kept"


def test_without_matplotlib_the_card_has_a_table_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    prepare(folder, "me/sparse")
    assert not (folder / HEAT_MAP).exists()
    assert HEAT_MAP not in (folder / "README.md").read_text()


def test_only_hub_datasets_are_named() -> None:
    assert hub_datasets(["builtin:heldout", "./a.txt", "hub:a/b:c", "hub:a/b", "hub:bad name", "wikitext2:test"]) == [
        "a/b",
        "Salesforce/wikitext",
    ]
